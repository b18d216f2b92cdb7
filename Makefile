# Everything runs in .venv inside this folder; nothing outside it is touched but the caches of pip
# and of the compiled kernel (~/.cache/dwl_kernels, or DWL_KERNELS_CACHE).

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# Without bytecode every process, and the tests start hundreds, would compile PyTorch's sources anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv test demo bench quality clients tables lint format build clean

help:
	@echo "make demo            what log-Q, domain weights and the dial for sparse domains do on a"
	@echo "                     synthetic catalogue, then speed and memory (about 2 minutes)"
	@echo "make demo DATA=path  the same on real ratings: a GroupLens folder such as ml-1m"
	@echo "make test            run the tests"
	@echo "make bench           measure speed, memory and accuracy against all rivals, write figures and"
	@echo "                     pictures to benchmarks/results/ and the README (under 15 minutes)"
	@echo "make bench QUICK=1   a look at smaller shapes (2 minutes); COMPARE=old.json adds ratios"
	@echo "make quality DATA=\"path path\"  train every loss and schedule on real ratings, several seeds, and"
	@echo "                     write tables, a picture and the README (hours; goes on where it stopped)"
	@echo "make clients         run the examples inside other packages' trainers, each in an environment of"
	@echo "                     its own, and compare with their losses (10 minutes, 4 GB; HSTU=checkout)"
	@echo "make tables          compile the kernels for GPUs, with no need of one, and write the tables of"
	@echo "                     machine code, as after a change to a kernel (5 minutes; needs nvcc)"
	@echo "make lint            ruff, mypy and clang-format, in the versions of constraints.txt"
	@echo "make format          let ruff and clang-format rewrite the files"
	@echo "make build           build the wheel and the source archive into dist/"
	@echo "make venv            only set up .venv"
	@echo "make clean           remove .venv, dist/ and caches"
	@echo
	@echo "Every target sets up .venv first. pip fetches PyTorch for CUDA by default; without a GPU,"
	@echo "  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo"
	@echo "saves some gigabytes."

venv: $(READY)

# The stamp is written last, so that an interrupted set-up starts anew.
$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (about a minute, once) ..."
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, $(PYTHON) is %d.%d; name another: make PYTHON=python3.12" % sys.version_info[:2])'
	@$(PYTHON) -m venv $(VENV)
	@echo "  1/2 PyTorch and the tools"
	@$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt torch hatchling
	@echo "  2/2 this package and the rest"
	@$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt \
		--no-build-isolation --editable '.[dev]'
	@touch $@

test: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

demo: $(READY)
	$(BIN)/python -m benchmarks.demo $(if $(DATA),--data "$(DATA)")

# The peers run on GPUs only, so they are fetched where there is one.
bench: $(READY)
	@if command -v nvidia-smi >/dev/null; then $(BIN)/python -m pip install -qq --no-compile \
		--disable-pip-version-check -c constraints.txt --no-build-isolation --editable '.[bench]'; fi
	$(BIN)/python -m benchmarks.speed $(if $(QUICK),--quick) $(if $(COMPARE),--compare "$(COMPARE)")
	$(if $(QUICK),,$(BIN)/python -m benchmarks.readme)

# Finished runs are kept: the same command goes on where it was stopped.
QUALITY = $(BIN)/python -m benchmarks.quality --data $(DATA) --jobs 2 --out benchmarks/results/quality
quality: $(READY)
	$(QUALITY) --seeds 5
	for setting in beyond cumulative dual-scale dual-scale-shifted; do \
		$(QUALITY) --seeds 3 --setting $$setting || exit 1; done
	$(BIN)/python -m benchmarks.readme

clients: $(READY)
	$(BIN)/python -m benchmarks.clients
	$(BIN)/python -m benchmarks.readme

# Each version of Triton has tables of its own: these are of the one in .venv. What the tests keep of
# the machine code is written as well, so that they need not compile (`tests/compiled.py`).
tables: $(READY)
	$(BIN)/python -m benchmarks.machine_code
	DWL_KERNELS_KEEP=1 $(BIN)/python -m pytest tests/test_machine_code*.py

CSRC = $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

build: $(READY)
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist

clean:
	rm -rf $(VENV) .clients dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
