"""The command of the speed benchmark: plans, tables, pictures, the comparison of two runs."""

from __future__ import annotations

import copy
import inspect
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from benchmarks import record
from benchmarks.progress import WIDTH
from benchmarks.readme import scales_line
from benchmarks.record import append_line, write_json
from benchmarks.speed import __main__ as command
from benchmarks.speed import peers, pictures, shapes, suite
from benchmarks.speed.accuracy import check
from benchmarks.speed.baselines import package_loss, usual_loss
from benchmarks.speed.measure import Rounds
from benchmarks.speed.report import (
    LEGEND,
    all_points,
    comparison,
    growth_table,
    rows_of,
    scale_table,
    shape_table,
)
from benchmarks.speed.shapes import CPU, GPU, TINY, random_inputs


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """A run of all kinds at tiny sizes, of two versions."""
    few = Rounds(0, least=2, most=2)
    growth = [TINY[0].shrunk(rows, 53, 0) for rows in (9, 37)]
    scales = shapes.scales(TINY[0])
    todo = suite.Plan("cpu", "dry", TINY, {"rows": growth}, few, few, few, scales)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "kernels", lambda device, dry: ["chunked"])
        found = {"eager": usual_loss, "chunked": partial(package_loss, backend="chunked")}
        patch.setattr(suite, "losses", lambda *_: found)
        steps: list[str] = []
        measured = suite.measure(todo, steps.append, lambda report: None)
    assert len(steps) == todo.steps
    return measured


def test_report_is_plain_json_that_names_commit_machine_shape_and_rounds(
    report: dict[str, Any],
) -> None:
    assert json.loads(json.dumps(report)) == report
    assert {"commit", "machine", "versions", "wall_seconds"} <= set(report)
    for figures in report["shapes"]:
        assert figures["shape"]["dtype"] == "float32"
        assert [row["runs"] for row in figures["versions"]] == [2, 2, 2]
        assert figures["errors"]["chunked"]["gradient"] < 1e-5
        assert figures["ladder"]["chunked"][0]["ratio"] == 1.0


def test_too_large_version_is_left_out_with_the_bytes_it_would_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needed = TINY[0].needed_bytes("eager")
    monkeypatch.setattr(suite, "machine_bytes", lambda device: needed / 0.81)  # a fifth stays free
    few = Rounds(0, least=1, most=1)
    todo = suite.Plan("cpu", "dry", TINY[:1], {}, few, few, few)
    found, figures = suite.admit(TINY[0], TINY[0], todo)
    assert "eager" not in found
    assert figures["too_large"]["eager"] == 4 * 37 * 53 * 4
    monkeypatch.setattr(suite, "machine_bytes", lambda device: needed / 0.79)
    assert "eager" in suite.admit(TINY[0], TINY[0], todo)[0]
    figures["versions"] = []
    assert "would need" in printed(shape_table(figures))


def printed(table: Any) -> str:
    console = Console(width=160)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_tables_name_every_version_and_size(report: dict[str, Any]) -> None:
    text = printed(shape_table(report["shapes"][0]))
    for wanted in ("matrix products", "eager", "chunked", "domain weights", "53 candidates"):
        assert wanted in text
    assert "\n   9 " in printed(growth_table("rows", report["growth"]["rows"]))
    text = printed(scale_table(report["scales"]))
    for wanted in ("±0.1", "±100", "rising", "chunked, D = 8"):
        assert wanted in text


def test_tables_fit_60_columns_and_need_no_other_page(report: dict[str, Any]) -> None:
    wide = copy.deepcopy(report)
    for point in all_points(wide):
        point["shape"]["twin"] = True
        for number, row in enumerate(point["versions"]):
            row.update(median_ms=99_999.0, high_ms=99_999.0, low_ms=0.0, ratio=99.5)
            row.update(peak_bytes=9.9e10, **({"launches": 14} if number else {}))
            if number == 1:
                row["version"] = "cut-cross-entropy, no filter"
    tables = [shape_table(figures) for figures in wide["shapes"]]
    growth = copy.deepcopy(report["growth"]["rows"])
    for point in growth:  # all that a GPU measures
        names = ("bound", "eager", "torch.compile", "chunked", "triton", "cuda")
        point["versions"] = [{"version": name, "median_ms": 9999.0} for name in names]
        point["shape"]["rows"] = 1_048_576
    tables += [growth_table("rows", growth), scale_table(report["scales"])]
    tables += comparison(report, wide)[0]
    for table in tables:
        assert Console(width=200, quiet=True).measure(table).maximum <= WIDTH
    said = LEGEND + "".join(map(printed, tables[: len(wide["shapes"]) + 2]))
    assert re.findall(r"bound|twin|\bhits?\b|ladder", said) == []
    assert max(map(len, LEGEND.splitlines())) <= WIDTH


def test_busy_machine_is_warned_of_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(record.time, "process_time", lambda: 30.0)  # this process: a half
    monkeypatch.setattr(record.os, "getloadavg", lambda: (0.9, 9.0, 9.0))
    assert record.busy() == ""
    monkeypatch.setattr(record.os, "getloadavg", lambda: (2.5, 0.0, 0.0))

    def stop(*_: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(command, "run", stop)
    with pytest.raises(InterruptedError):
        command.main(["--quick", "--out", str(tmp_path)])
    said = " ".join(capsys.readouterr().out.split())
    assert "busy: in the last minute other processes kept 2.0 of its" in said


def test_pictures_are_drawn_for_what_was_measured(report: dict[str, Any], tmp_path: Path) -> None:
    drawn = [path.name for path in pictures.draw(report, tmp_path)]
    names = ("", "-ladder", "-growth", "-scales")
    assert drawn == [f"speed-cpu{name}.png" for name in names]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in drawn)


def test_readme_says_how_the_time_depends_on_the_scale(report: dict[str, Any]) -> None:
    points = copy.deepcopy(report["scales"])
    for point, ratio in zip(points, (0.9, 0.8, 0.9, 0.9, 0.9, 1.0, 1.3), strict=True):
        point["versions"][1].update(version="cpu", ratio=ratio)
    assert scales_line(points)[0] == (
        "Logits of standard deviation 0.1 to 100: 0.80 to 1.00 times the bound; where every tile "
        "of candidates outscores all before it, 1.30 at most."
    )
    assert scales_line([]) == []


def test_picture_of_a_run_without_a_gpu_says_so(report: dict[str, Any]) -> None:
    assert "No GPU in this run" in pictures.footer(report)


def test_pictures_of_a_gpu_show_launches(report: dict[str, Any], tmp_path: Path) -> None:
    on_gpu = copy.deepcopy(report)
    on_gpu["device"], on_gpu["machine"]["gpu"] = "cuda", "some GPU"
    for figures in on_gpu["shapes"]:
        for row in figures["versions"][1:]:
            row.update(launches=2, kernels_ms=0.1, peak_bytes=5e6)
    assert "speed-cuda-launches.png" in [p.name for p in pictures.draw(on_gpu, tmp_path)]
    assert "launches" in printed(shape_table(on_gpu["shapes"][0]))


def test_same_run_is_no_slower_than_itself(report: dict[str, Any]) -> None:
    _, worse = comparison(report, report)
    assert worse == 0


def test_slower_beyond_the_spread_is_flagged(report: dict[str, Any]) -> None:
    new = copy.deepcopy(report)
    row = rows_of(new)[report["shapes"][0]["label"], "chunked"]
    for key in ("ratio", "ratio_low", "ratio_high"):
        row[key] = 2 * row["ratio_high"]
    tables, worse = comparison(report, new)
    assert worse == 1
    assert "SLOWER" in printed(tables[0])
    assert comparison(new, report)[1] == 0


def test_more_memory_is_flagged(report: dict[str, Any]) -> None:
    old, new = copy.deepcopy(report), copy.deepcopy(report)
    for either, peak in ((old, 10e6), (new, 12e6)):
        rows_of(either)[report["shapes"][0]["label"], "chunked"]["peak_bytes"] = peak
    tables, worse = comparison(old, new)
    assert worse == 1
    assert "MORE MB" in printed(tables[0])


def test_figures_are_shown_and_drawn_again_without_measuring(
    report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "old.json"
    write_json(path, report)
    arguments = ["--load", str(path), "--compare", str(path), "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    assert "0 got worse" in capsys.readouterr().out
    assert (tmp_path / "speed-cpu.png").exists()


def test_committed_figures_are_of_this_format_and_nothing_was_wrong(tmp_path: Path) -> None:
    results = sorted(command.RESULTS.glob("speed-*.json"))
    assert results
    for path in results:
        assert command.main(["--load", str(path), "--out", str(tmp_path)]) == 0
        for drawn in tmp_path.glob("*.png"):
            assert (command.RESULTS / drawn.name).exists()


def test_refused_version_ends_the_command_with_an_error(
    report: dict[str, Any], tmp_path: Path
) -> None:
    refused = copy.deepcopy(report)
    refused["shapes"][0]["refused"] = {"chunked": "wrong loss"}
    path = tmp_path / "wrong.json"
    write_json(path, refused)
    assert command.main(["--load", str(path), "--out", str(tmp_path)]) == 1


@pytest.mark.parametrize(
    "arguments", [["--shapes", "no-such-shape"], ["--compare", "no-such-file.json"]]
)
def test_unknown_shape_or_file_is_a_usage_error(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2


def test_json_of_another_format_is_no_comparison(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    write_json(path, {"format": 1})
    with pytest.raises(SystemExit, match="has format 1"):
        command.read(path)


def test_only_full_runs_write_to_the_results() -> None:
    assert command.parsed([]).out == command.RESULTS
    for partial_run in (["--quick"], ["--dry"], ["--shapes", "small"]):
        assert command.parsed(partial_run).out != command.RESULTS


def test_plans_measure_what_their_device_holds() -> None:
    assert suite.plan("cpu", "full").shapes == CPU
    assert suite.plan("cuda", "full").shapes == GPU
    assert [s.name for s in suite.plan("cpu", "dry").shapes] == [s.name for s in GPU]
    assert suite.plan("cpu", "full", ["small"]).growth == {}
    assert suite.plan("cpu", "full", ["small"]).scales == []
    assert suite.plan("cpu", "quick").growth == {}  # two minutes have no room for it
    assert {s.dim for s in suite.plan("cpu", "full").scales} == {64, 128}
    by_name = {shape.name: shape for shape in CPU}
    for shape in suite.plan("cpu", "quick").shapes:
        assert shape.logits_bytes <= by_name[shape.name].logits_bytes


def test_json_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "results" / "speed.json"
    write_json(path, {"runs": 1})
    with pytest.raises(TypeError):  # no JSON: the old file stays, and nothing is left beside it
        write_json(path, {"runs": object()})
    assert json.loads(path.read_text()) == {"runs": 1}
    assert list(path.parent.iterdir()) == [path]


CATALOGUE, IN_BATCH = (next(s for s in GPU if s.name == n) for n in ("catalogue", "unscaled"))


def test_peers_that_are_not_installed_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(peers.importlib, "import_module", absent)
    for shape in GPU:
        found, left_out = peers.losses(shape, "cuda")
        assert not found
        assert bool(left_out) == (shape in (CATALOGUE, IN_BATCH))
        assert all("No module named" in reason for reason in left_out.values())


def stand_ins() -> dict[str, Any]:
    """For each package, with its signature: the full softmax, the one in the batch, the sigmoid."""

    def liger(accum_dtype: Any = None) -> Any:
        return lambda lin_weight, _input, target: F.cross_entropy(_input @ lin_weight.T, target)

    def quack(x: Any, weight: Any, target: Any, use_scaled_exp: Any = None) -> Any:
        return F.cross_entropy(x @ weight.T, target)

    def cut(e: Any, c: Any, targets: Any, filter_eps: Any = "high") -> Any:
        return F.cross_entropy(e @ c.T, targets)

    class Memeff(torch.nn.Module):
        def __init__(self, temperature: Any, margin: Any, normalized_inputs: Any, stable: Any):
            super().__init__()
            self.temperature = temperature

        def forward(self, query_features: Any, doc_features: Any) -> Any:
            z = query_features @ doc_features.T / self.temperature
            return F.cross_entropy(z, torch.arange(len(z)))

    def siglip(img: Any, txt: Any, log_temperature: Any, bias: Any, backend: str) -> Any:
        z = img @ txt.T * log_temperature.exp() + bias
        signs = 2 * torch.eye(len(z)) - 1
        return -F.logsigmoid(signs * z).sum() / len(z)

    function = SimpleNamespace(apply=quack)
    return {
        "liger_kernel.transformers": SimpleNamespace(LigerFusedLinearCrossEntropyLoss=liger),
        peers._HOPPER: SimpleNamespace(LigerFusedLinearCrossEntropySM90Function=function),
        "quack.linear_cross_entropy": SimpleNamespace(chunked_linear_cross_entropy=quack),
        "cut_cross_entropy": SimpleNamespace(linear_cross_entropy=cut),
        "memeff": SimpleNamespace(MemoryEfficientQwen3Loss=Memeff),
        "siglip_kernel": SimpleNamespace(fused_siglip_loss=siglip),
    }


def test_peers_get_the_problem_in_their_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib, "import_module", stand_ins().__getitem__)
    tried = set()
    for shape in (CATALOGUE, IN_BATCH):
        found, left_out = peers.losses(shape, "cuda")
        assert left_out == {}
        inputs = random_inputs(replace(TINY[2 if shape is CATALOGUE else 1], plain=True), "plain")
        for name, loss in found.items():
            expected = peers.FORMULAS.get(name, usual_loss)(inputs)
            assert loss(inputs).item() == pytest.approx(expected.item(), rel=1e-5)
        tried |= set(found)
        assert set(peers.losses(shape, "cpu")[1].values()) == {"it needs a CUDA device"}
    assert tried == set(peers.PEERS)


def test_peers_name_the_shapes_that_they_take() -> None:
    odd = replace(CATALOGUE, rows=100, candidates=1000)
    _, left_out = peers.losses(odd, "cuda")
    for name in ("liger-kernel, Hopper", "quack-kernels"):
        assert "divides" in left_out[name]
    assert "dimensions" in peers.losses(replace(IN_BATCH, dim=48), "cuda")[1]["memeff"]
    assert (
        "16 bits"
        in peers.losses(replace(IN_BATCH, dtype=torch.float32), "cuda")[1]["siglip-kernel"]
    )


@pytest.mark.parametrize(
    ("module", "name", "given"),
    [
        (peers._LIGER, "LigerFusedLinearCrossEntropyLoss", {"accum_dtype": torch.float32}),
        (peers._QUACK, "chunked_linear_cross_entropy", {"use_scaled_exp": False}),
        (peers._CUT, "linear_cross_entropy", {"filter_eps": None}),
        ("memeff", "MemoryEfficientQwen3Loss", dict.fromkeys(("margin", "stable"))),
        ("siglip_kernel", "fused_siglip_loss", {"backend": "chunked_bf16"}),
    ],
)
def test_installed_peer_has_the_interface_that_is_called(
    module: str, name: str, given: dict[str, Any]
) -> None:
    found = getattr(pytest.importorskip(module, exc_type=Exception), name)
    inspect.signature(found).bind_partial(**given)


def test_other_loss_is_checked_against_its_own_formula() -> None:
    versions = {"siglip-kernel": peers.sigmoid_loss, "another": peers.sigmoid_loss}
    verdict = check(replace(TINY[1], plain=True), versions)
    assert verdict.passed == ["siglip-kernel"]


def test_versions_are_chosen_with_or_without_their_settings() -> None:
    assert suite.chosen("quack-kernels, logits kept", ("quack-kernels",))
    assert suite.chosen("eager", ())
    assert not suite.chosen("quack-kernels", ("quack-kernels, logits kept", "eager"))


def test_lines_of_several_processes_are_one_report(report: dict[str, Any], tmp_path: Path) -> None:
    """Two shapes, and a rival of the first in a process of its own."""
    first, second = (copy.deepcopy(report["shapes"][k]) for k in (0, 1))
    rival = copy.deepcopy(first)
    rival["versions"][1]["version"] = "rival"
    rival["failed"] = {"another": "not installed"}
    path = tmp_path / "1.jsonl"
    append_line(path, record={**report, "shapes": []})
    for figures in (first, second, rival):
        append_line(path, begun="check")
        append_line(path, figures=figures)
    assert command.main(["--load", str(path), "--out", str(tmp_path)]) == 0
    made = command.read(tmp_path / "speed-cpu.json")
    assert [s["label"] for s in made["shapes"]] == [first["label"], second["label"]]
    names = [row["version"] for row in made["shapes"][0]["versions"]]
    assert names == ["bound", "eager", "chunked", "rival"]
    assert made["shapes"][0]["failed"] == {"another": "not installed"}
    with path.open("a") as file:
        file.write(json.dumps({"gpu": "another device"}) + "\n")
    with pytest.raises(SystemExit, match="another device"):
        command.main(["--load", str(path), "--out", str(tmp_path)])
