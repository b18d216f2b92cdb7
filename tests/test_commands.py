"""Commands from outside: Ctrl-C ends each in one line, and long ones say what they do."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import demo, progress, training_step
from benchmarks.progress import Progress, in_processes
from benchmarks.quality import __main__ as quality
from benchmarks.quality import runs
from benchmarks.speed import __main__ as speed
from benchmarks.speed import suite
from dwl_kernels import _interrupt
from dwl_kernels.examples.synthetic import synthetic

ROOT = Path(__file__).parent.parent
COMMANDS = [
    *("dwl_kernels", "dwl_kernels.examples.two_tower", "dwl_kernels.examples.sasrec"),
    *("benchmarks.speed", "benchmarks.quality"),
    *("benchmarks.demo", "benchmarks.training_step", "benchmarks.devices"),
    *("benchmarks.machine_code", "benchmarks.host", "benchmarks.readme", "benchmarks.clients"),
]


# ---------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize("module", COMMANDS)
def test_ctrl_c_ends_a_command_in_one_line_even_while_torch_loads(
    tmp_path: Path, module: str
) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run(
        [sys.executable, "-m", module],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_other_programs_keep_their_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    own = sys.excepthook
    for given in (["program.py"], ["-m"]):
        monkeypatch.setattr(sys, "argv", given)
        monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "program"])
        importlib.reload(_interrupt)
        assert sys.excepthook is own


def test_other_errors_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    _interrupt.hook(ValueError, ValueError("wrong"), None)
    assert capsys.readouterr().err == "ValueError: wrong\n"
    with pytest.raises(SystemExit) as caught:
        _interrupt.hook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert caught.value.code == 130


# What runs in the background of a shell inherits that Ctrl-C is ignored.
WAITING = """
if __name__ == "__main__":
    import signal
    from benchmarks.progress import in_processes

    signal.signal(signal.SIGINT, signal.default_int_handler)
    work = "import time; print('begun', flush=True); time.sleep(60)"
    dict(in_processes(exec, {1: (work,), 2: (work,)}, 1))
"""


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A command whose process has begun to work."""
    (tmp_path / "waiting.py").write_text(WAITING)
    process = subprocess.Popen(
        [sys.executable, "waiting.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_ctrl_c_ends_the_processes_of_a_command_without_a_word(
    waiting: subprocess.Popen[str],
) -> None:
    os.killpg(waiting.pid, signal.SIGINT)  # as a terminal does
    _, said = waiting.communicate(timeout=20)
    assert said.count("Traceback") == 1  # that of the main process: no command of the package
    assert said.endswith("KeyboardInterrupt\n")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_a_command_that_is_killed(
    waiting: subprocess.Popen[str], how: signal.Signals
) -> None:
    waiting.send_signal(how)
    waiting.communicate(timeout=20)  # until nobody has the other end of the pipes


def test_processes_give_every_result_with_its_key() -> None:
    assert dict(in_processes(pow, {"a": (2, 3), "b": (3, 2)}, 1)) == {"a": 8, "b": 9}


# ---------------------------------------------------------------- progress


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lines of progress come in time for a test, from commands on one thread."""
    assert progress.EVERY < 30
    monkeypatch.setattr(progress, "EVERY", 0.001)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_line_comes_again_while_a_step_takes_its_time(
    often: None, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ""
    with Progress() as say:
        say("3 of 4, " + "a long name " * 9)
        while said.count("\n") < 2:
            time.sleep(0.01)
            said += capsys.readouterr().out
    for line in said.splitlines()[:2]:  # another may have begun
        assert re.fullmatch(r"\d+ s: 3 of 4, a long name .*", line)
        assert len(line) == 60


def test_terminal_has_one_line_that_is_cleared(
    often: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    said = ""
    with Progress() as say:
        say("something")
        while not said:
            time.sleep(0.01)
            said += capsys.readouterr().out
    said += capsys.readouterr().out
    assert re.fullmatch(r"(\033\[K\d+ s: something\r)+\033\[K", said)


def slow(*_: Any, **__: Any) -> Any:
    time.sleep(0.05)
    raise InterruptedError


@pytest.mark.parametrize("name", ["speed", "quality", "demo", "training_step", "machine_code"])
def test_long_command_says_what_it_does(
    often: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    name: str,
) -> None:
    """The first long step of each takes a while, and then stops the command."""
    out = ["--out", str(tmp_path)]
    data = synthetic(users=60, items=80, domains=8, length=12)
    monkeypatch.setattr(demo, "synthetic", lambda: data)
    for module in (quality, runs):
        monkeypatch.setattr(module, "load_data", lambda name: data)
    if name == "speed":
        monkeypatch.setattr(suite, "forget_compiled", lambda: None)  # imports a compiler
        monkeypatch.setattr(suite, "admit", slow)
        call, wanted = lambda: speed.main(["--shapes", "small", *out]), "1/4 check small"
    elif name == "quality":
        monkeypatch.setattr(runs, "in_processes", slow)
        call, wanted = lambda: quality.main(out), "synthetic: 15 runs to train"
    elif name == "demo":
        monkeypatch.setattr(demo.two_tower, "train", slow)
        call, wanted = lambda: demo.main(out), "two towers without log-Q"
    elif name == "training_step":
        monkeypatch.setattr(training_step, "measured", slow)
        call, wanted = lambda: training_step.main(out), "two towers, 4,096"
    else:
        pytest.importorskip("triton")
        from benchmarks.machine_code import __main__ as machine_code

        monkeypatch.setattr(machine_code, "in_processes", slow)
        call, wanted = lambda: machine_code.main([str(tmp_path)]), "Triton, 0 of "
    with pytest.raises(InterruptedError):
        call()
    assert f" s: {wanted}" in capsys.readouterr().out


# ---------------------------------------------------------------- tables


def test_training_step_prints_a_table_of_60_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ms = {"step_ms": 12345.6, "loss_ms": 12345.6}
    monkeypatch.setattr(training_step, "measured", lambda *_: {"pytorch": ms, "package": ms})
    assert training_step.main(["--out", str(tmp_path / "step.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    assert "plain PyTorch        12345.6   12345.6" in lines


def test_demo_fits_60_columns(
    often: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = synthetic(users=300, items=80, domains=8, length=12)
    monkeypatch.setattr(demo, "synthetic", lambda: data)
    scores = torch.zeros(data.num_users, data.num_items)
    monkeypatch.setattr(demo.two_tower, "train", lambda *_: scores)
    ranks = np.zeros(data.num_users, np.int64)
    trained = SimpleNamespace(model=None)
    monkeypatch.setattr(demo, "train", lambda *given: (given[-1]("99%"), trained)[1])
    monkeypatch.setattr(demo, "rank_targets", lambda *given: np.stack([ranks] * len(given[3:])))
    times = [
        SimpleNamespace(version=name, median_ms=ms, ratio=ms)
        for name, ms in (("eager", 12345.0), ("cpu", 1234.0), ("chunked", 1234.0))
    ]
    monkeypatch.setattr(demo, "kernels", lambda device: ["cpu"])
    monkeypatch.setattr(demo, "compare_versions", lambda *_: times)
    monkeypatch.setattr(demo, "peak_memories", lambda *_: {"eager": 1.2e10, "cpu": 1.2e8})
    few = SimpleNamespace(passed=[], refused={})
    monkeypatch.setattr(demo, "check", lambda *_: few)
    monkeypatch.setattr(demo, "draw", lambda *_: None)
    assert demo.main(["--steps", "2", "--epochs", "1", "--out", str(tmp_path)]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 60
