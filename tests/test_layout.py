"""Which module may import which, as CONTRIBUTING.md says, read from the sources."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dwl_kernels"
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imported(name: str, *, at_once: bool = False) -> Iterator[str]:
    """The modules of the package that a module imports, `at_once` those that its import imports."""
    nodes = [ast.parse(FILES[name].read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found = inner if inner in FILES else str(node.module)
                if found in FILES:
                    yield found
        elif not (at_once and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            nodes += ast.iter_child_nodes(node)


def inside(name: str, *parts: str) -> bool:
    return any(
        name == f"dwl_kernels.{part}" or name.startswith(f"dwl_kernels.{part}.") for part in parts
    )


GRAPH = {name: set(imported(name)) for name in FILES}


@pytest.mark.parametrize(
    ("part", "allowed"), [("core", ("core",)), ("backends", ("core", "backends"))]
)
def test_lower_layers_import_nothing_from_above(part: str, allowed: tuple[str, ...]) -> None:
    lower = {name: found for name, found in GRAPH.items() if inside(name, part)}
    assert any(lower.values())
    above = {(n, f) for n, found in lower.items() for f in found if not inside(f, *allowed)}
    assert not above


SPECIFICATION = {name for name in FILES if inside(name, "backends.reference")}


def test_specification_is_imported_by_the_registry_alone() -> None:
    users = {name for name, found in GRAPH.items() if found & SPECIFICATION} - SPECIFICATION
    assert users == {"dwl_kernels.backends"}


def test_specification_shares_no_formula_with_a_backend() -> None:
    found = set().union(*(GRAPH[name] for name in SPECIFICATION)) - SPECIFICATION
    assert found == {"dwl_kernels.core.problem", "dwl_kernels.core.values"}


def test_imports_have_no_cycle() -> None:
    at_once = {name: set(imported(name, at_once=True)) for name in FILES}
    assert len(list(graphlib.TopologicalSorter(at_once).static_order())) == len(FILES)


def test_wheel_has_sources_and_no_tests() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    wheel = project.partition("[tool.hatch.build.targets.wheel]")[2].partition("[tool")[0]
    assert 'only-include = ["dwl_kernels", "csrc"]' in wheel
    names = [path.name for part in ("dwl_kernels", "csrc") for path in (ROOT / part).rglob("*")]
    assert "formulas.py" in names
    assert not [name for name in names if name.startswith(("test", "conftest", "emulat"))]


def test_files_say_what_they_are_and_end() -> None:
    """Each opens with a docstring or a comment, and has at most 400 lines."""
    kinds = {".py": '"""', ".cpp": "//", ".h": "//", ".cu": "//", ".cuh": "//", ".sh": "#!"}
    for part in ("dwl_kernels", "csrc", "benchmarks"):
        for path in (ROOT / part).rglob("*"):
            if path.suffix in kinds:
                text = path.read_text()
                assert text.startswith(kinds[path.suffix]), path
                assert text.count("\n") <= 400, path


def test_import_leaves_the_compiler_of_torch_alone() -> None:
    """It takes seconds. Asked in a process of its own, since tests compile."""
    script = "import sys, dwl_kernels; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_loss_over_ranks_leaves_the_compiler_of_torch_alone() -> None:
    script = """
import sys, torch
import torch.distributed as dist
from dwl_kernels import DynamicWeightedSampledSoftmax
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
loss = DynamicWeightedSampledSoftmax(3, process_group=dist.group.WORLD, backend="eager")
query, positive = torch.ones(2, 4, 8, requires_grad=True)
loss(query, positive, domain_ids=torch.arange(4) % 3).backward()
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
