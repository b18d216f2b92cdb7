"""The speed benchmark refuses what is wrong, before it takes a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.speed import accuracy, suite
from benchmarks.speed.accuracy import check, deviation, evaluate, specification
from benchmarks.speed.baselines import losses, package_loss, usual_loss
from benchmarks.speed.measure import Rounds
from benchmarks.speed.shapes import TINY, Inputs, Level, Shape, random_inputs
from dwl_kernels.backends import chunked
from dwl_kernels.core.problem import GradMask, Output, Problem

SHARED = TINY[0]
solve = chunked.solve


def does_nothing(problem: Problem, wanted: GradMask, row_grad: Tensor | None = None) -> Output:
    zeros = [torch.zeros_like(x) for x in (problem.query, problem.positive, problem.candidates)]
    return Output(torch.zeros(()), *zeros)


def skips_a_gradient(problem: Problem, wanted: GradMask, row_grad: Tensor | None = None) -> Output:
    output = solve(problem, wanted, row_grad)
    assert output.candidates is not None
    return output._replace(candidates=torch.zeros_like(output.candidates))


def errs_by_a_thousandth(
    problem: Problem, wanted: GradMask, row_grad: Tensor | None = None
) -> Output:
    output = solve(problem, wanted, row_grad)
    assert output.query is not None
    return output._replace(query=output.query * 1.001)


@pytest.mark.parametrize(
    ("planted", "what"),
    [
        (does_nothing, "wrong loss"),
        (skips_a_gradient, "wrong gradient of negative"),
        (errs_by_a_thousandth, "wrong gradient of query"),
    ],
)
def test_planted_backend_is_refused_and_never_timed(
    planted: Callable[..., Output], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "solve", planted)
    monkeypatch.setattr(suite, "kernels", lambda device, dry: ["chunked"])
    monkeypatch.setattr(
        suite,
        "losses",
        lambda *_: {"eager": usual_loss, "chunked": partial(package_loss, backend="chunked")},
    )
    few = Rounds(0, least=1, most=1)
    todo = suite.Plan("cpu", "dry", (SHARED,), {"rows": [SHARED]}, few, few, few)
    report = suite.measure(todo, lambda step: None, lambda report: None)
    for figures in (report["shapes"][0], report["growth"]["rows"][0]):
        assert what in figures["refused"]["chunked"]
        assert [row["version"] for row in figures["versions"]] == ["bound", "eager"]
    assert report["shapes"][0]["ladder"] == {}


def test_rival_that_leaves_a_gradient_out_is_refused() -> None:
    verdict = check(SHARED, {"rival": lambda x: usual_loss(replace(x, query=x.query.detach()))})
    assert verdict.refused == {"rival": "wrong gradient of query: error 1.0e+00, allowed 5.0e-02"}


def test_error_of_a_rival_is_a_result_until_it_computes_something_else() -> None:
    verdict = check(SHARED, {"rival": lambda x: 1.001 * usual_loss(x)})
    assert verdict.refused == {}
    assert verdict.errors["rival"].loss == pytest.approx(1e-3, rel=0.01)
    assert verdict.errors["rival"].gradient == pytest.approx(1e-3, rel=0.01)


def test_version_that_raises_does_not_stop_the_others() -> None:
    def out_of_memory(x: Inputs) -> Tensor:
        raise torch.OutOfMemoryError("so many bytes")

    verdict = check(SHARED, {"rival": out_of_memory, "eager": usual_loss})
    assert verdict.failed == {"rival": "OutOfMemoryError: so many bytes"}
    assert verdict.passed == ["eager"]


def test_nan_is_wrong() -> None:
    verdict = check(SHARED, {"rival": lambda x: usual_loss(x) * torch.nan})
    assert "wrong loss" in verdict.refused["rival"]


@pytest.mark.parametrize("shape", TINY, ids=str)
def test_every_version_that_runs_here_is_right(shape: Shape) -> None:
    found = losses(shape, "cpu")
    del found["torch.compile"]  # half a minute, and it computes what "eager" computes
    verdict = check(shape, found)
    assert verdict.refused == verdict.failed == {}
    assert {"eager", "chunked"} <= set(verdict.errors)


@pytest.mark.parametrize("level", ["plain", "log-Q", "hits", "domain weights"])
@pytest.mark.parametrize("shape", TINY, ids=str)
def test_eager_as_people_write_it_is_the_specification_at_every_level(
    shape: Shape, level: Level
) -> None:
    inputs = random_inputs(shape, level)
    errors = deviation(evaluate(usual_loss, inputs), specification(inputs.to(torch.float64)))
    assert max(errors.loss, errors.gradient) < 1e-5


@pytest.mark.parametrize("shape", TINY, ids=str)
def test_each_level_changes_the_loss(shape: Shape) -> None:
    found = [usual_loss(random_inputs(shape, level)).item() for level in shape.levels]
    assert len(set(found)) == len(shape.levels)


@pytest.mark.parametrize("level", ["plain", "domain weights"])
@pytest.mark.parametrize("shape", TINY, ids=str)
def test_specification_by_blocks_of_rows_is_that_of_the_whole(
    shape: Shape, level: Level, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = random_inputs(shape, level).to(torch.float64)
    monkeypatch.setattr(accuracy, "BLOCK", 5 * 90)  # several blocks, the last one shorter
    blocks = specification(inputs)
    whole = evaluate(partial(package_loss, backend="eager"), inputs)
    errors = deviation(blocks, whole)
    assert max(errors.loss, errors.gradient) < 1e-12


def test_large_shapes_are_checked_on_fewer_rows_by_a_cpu() -> None:
    catalogue = Shape("catalogue", "full", 4096, 65_536, 64)
    checked = accuracy.checked_shape(catalogue, "cpu")
    assert (checked.rows, checked.candidates, checked.dim) == (512, 65_536, 64)
    assert accuracy.checked_shape(catalogue, "cuda") is catalogue
    assert accuracy.checked_shape(SHARED, "cpu") is SHARED
