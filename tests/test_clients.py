"""The losses inside other packages' trainers: the examples, and the command that compares them.

Without a client its case is skipped; ``make clients`` installs them all and runs the same.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import readme
from benchmarks.clients import __main__ as command
from benchmarks.clients import compare
from dwl_kernels.examples.clients import hstu_loss

INSTALLED_AS = {"replay-rec": "replay.nn", "sentence-transformers": "sentence_transformers"}
PIP = subprocess.CalledProcessError(1, "pip", stderr="much\nERROR: No matching distribution\n")


@pytest.mark.parametrize("client", command.CLIENTS, ids=lambda client: client.example)
def test_swap_is_the_loss_of_the_client(
    client: command.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some clients write where they run
    monkeypatch.setattr(compare, "HSTU", None)
    if client.example != "hstu_loss":  # which compares with a formula
        module = INSTALLED_AS.get(client.package, client.package)
        pytest.importorskip(module, reason=f"{client.package} is not installed; run make clients")
    found = compare.differences(compare.EXAMPLES[client.example]())
    assert command.agrees({"client": client.client, **found}), found


def test_every_example_has_a_comparison_and_few_lines_that_change() -> None:
    folder = Path(hstu_loss.__file__).parent
    examples = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert examples == {client.example for client in command.CLIENTS} == set(compare.EXAMPLES)
    for example in examples:
        assert 2 <= command.swapped_lines(command.source(example)) <= 35, example


def test_example_without_a_client_runs(capsys: pytest.CaptureFixture[str]) -> None:
    hstu_loss.main()
    assert capsys.readouterr().out.startswith("loss ")


def test_padded_steps_of_hstu_do_not_leak() -> None:
    torch.manual_seed(0)
    items = torch.nn.Embedding(50, 8)
    states, ids, lengths = (
        torch.randn(4, 6, 8),
        torch.randint(50, (4, 6)),
        torch.tensor([6, 3, 0, 1]),
    )
    states[1, 3:], states[2] = torch.nan, torch.inf
    loss_fn = hstu_loss.SampledSoftmaxLoss(10, 0.5)
    weights, sampler = torch.ones(4, 6), hstu_loss.UniformNegatives(items)
    loss, other = loss_fn(lengths, states, ids, items(ids), weights, sampler)
    assert loss.isfinite()
    assert other == {}


def test_swapped_lines_are_code_between_the_marks_and_the_import() -> None:
    text = "from dwl_kernels import A\n\n# swap: why\na = A()\n\n# no code\nb = 1\n# end\nc = 2\n"
    assert command.swapped_lines(text) == 3


@pytest.mark.parametrize("wrong", ["loss", "weight"])
def test_other_loss_or_gradient_is_seen(wrong: str) -> None:
    own = {"loss": torch.tensor(2.0), "weight": torch.tensor([1.0, 4.0])}
    ours = own | {wrong: own[wrong] * 1.5}
    found = compare.differences([(own, own), (own, ours), (own, own)])
    assert found == {"loss": 0.5 * (wrong == "loss"), "gradient": 0.5 * (wrong == "weight")}
    assert not command.agrees({"client": "some", **found})


def test_gradient_that_is_missing_raises() -> None:
    own = {"loss": torch.tensor(2.0), "weight": torch.ones(2)}
    with pytest.raises(ValueError, match=r"no gradient to \['weight'\]"):
        compare.differences([(own, {"loss": torch.tensor(2.0)})])


def test_client_that_cannot_be_installed_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(client: command.Client) -> Path:
        raise PIP

    monkeypatch.setattr(command, "environment", refuse)
    row = command.row(command.CLIENTS[0])
    assert "loss" not in row
    assert row["not_run"] == "ERROR: No matching distribution"
    assert command.agrees(row)
    table = readme.clients_table({"clients": [row], **command.record()})
    assert "| not run: ERROR: No matching distribution | – |" in table


def test_table_names_version_lines_and_differences() -> None:
    row: dict[str, Any] = {
        "client": "Some",
        "example": "some_example",
        "own": "`Loss`",
        "version": "1.2",
    }
    row |= {"lines": 7, "loss": 1.2e-7, "gradient": 3.4e-6}
    report = {"clients": [row], "time": "2026-01-02T03:04", "versions": {"torch": "9.9"}}
    table = readme.clients_table(report)
    assert "/some_example.py) 1.2 | `Loss` | 7 | 1e-07 | 3e-06 |" in table
    assert "2026-01-02, torch 9.9" in table


def test_environment_is_made_again_only_where_its_requirements_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed: list[tuple[str, ...]] = []
    monkeypatch.setattr(command, "called", lambda python, *arguments: installed.append(arguments))
    monkeypatch.setattr(command.venv, "create", lambda folder, **_: folder.mkdir(exist_ok=True))
    for wanted in ["a"], ["a"], ["a", "b"]:
        command.made(tmp_path / "one", [wanted])
    assert [arguments[5:] for arguments in installed] == [("a",), ("a", "b")]


def test_unknown_example_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.sys, "argv", ["clients", "no_such"])
    with pytest.raises(SystemExit, match="no_such; there are lightning_domains"):
        command.main()


def test_committed_results_agree() -> None:
    report = json.loads(readme.CLIENTS.read_text("utf-8"))
    assert [row["client"] for row in report["clients"]] == [c.client for c in command.CLIENTS]
    assert all(map(command.agrees, report["clients"]))
