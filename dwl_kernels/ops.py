"""The registered ops: of the losses ``softmax_loss`` and ``scale``, of what they know of their rows
``softmax_statistics``, and ``rank_targets``.

`softmax_loss` solves a problem on any backend: it returns the loss and, in the same call, the
gradients that are wanted. Its schema and its fake are made from the fields of `SharedProblem`,
`PerRowProblem` and `RowOptions`, whose union are its arguments. `scale` multiplies gradients by the
upstream gradient. `autograd` calls both, or what they consist of where nobody watches. The others
have no gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from dwl_kernels import backends
from dwl_kernels.core.batching import register_by_slices
from dwl_kernels.core.problem import (
    FLOATS,
    Correction,
    DualScale,
    GradMask,
    Output,
    PerRowProblem,
    Problem,
    RankProblem,
    Reduction,
    RowOptions,
    SharedProblem,
    SoftmaxStatistics,
    accumulate_dtype,
)
from dwl_kernels.core.values import autocasting, no_autocast
from dwl_kernels.op_checks import check_problem, check_ranks, check_scale

# What two fields of `PerRowProblem` are called in the op, where `SharedProblem` has them as well.
_SHARED_NAMES = {"item_table": "candidates", "positive_rows": "target"}
_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    int: "int",
    Correction: "str",
    Reduction: "str",
    DualScale | None: "float[]?",
}


class Argument(NamedTuple):
    name: str
    type: str
    default: Any  # in a problem that has no such field


def arguments_of_a_problem() -> list[Argument]:
    """The union of the fields of both problems, in the order of `SharedProblem`."""
    shared, rows = get_type_hints(SharedProblem), get_type_hints(RowOptions)
    names, before = list(shared), "query"
    for field in PerRowProblem._fields:
        name = _SHARED_NAMES.get(field, field)
        if name not in names:
            names.insert(names.index(before) + 1, name)
        before = name
    hints = {name: shared.get(name, Tensor | None) for name in names}
    defaults = SharedProblem._field_defaults
    arguments = []
    for name, hint in hints.items():
        if hint is RowOptions:
            arguments += [Argument(row, _TYPES[kind], None) for row, kind in rows.items()]
        else:
            arguments.append(Argument(name, _TYPES[hint], defaults.get(name)))
    return arguments


ARGUMENTS = arguments_of_a_problem()
_SCHEMA = ", ".join(f"{argument.type} {argument.name}" for argument in ARGUMENTS)
_library = torch.library.Library("dwl_kernels", "DEF")
_library.define(
    f"softmax_loss({_SCHEMA}, Tensor? row_grad, bool[] wanted, str backend) -> "
    f"({', '.join('Tensor' for _ in Output._fields)})",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "scale(Tensor[] gradients, Tensor upstream, int[] dtypes) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"softmax_statistics({_SCHEMA}, str backend) -> "
    f"({', '.join('Tensor' for _ in SoftmaxStatistics._fields)})",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_RANKS = ", ".join(f"{_TYPES[hint]} {name}" for name, hint in get_type_hints(RankProblem).items())
_library.define(
    f"rank_targets({_RANKS}, str backend) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
# Dtypes travel as places in this list: PyTorch 2.11 hands an op the numbers of a ScalarType[] list,
# which `Tensor.to` then takes for a CUDA device. Exported graphs hold the places: a new dtype comes
# last.
DTYPES = [torch.float64, *[dtype for dtype in FLOATS if dtype != torch.float64]]


def arguments_of(problem: Problem) -> list[Any]:
    """The problem as arguments of the op."""
    given = problem._asdict()
    given |= given.pop("rows")._asdict()
    if given.get("dual") is not None:
        given["dual"] = [float(number) for number in given["dual"]]
    given = {_SHARED_NAMES.get(name, name): value for name, value in given.items()}
    return [given.get(argument.name, argument.default) for argument in ARGUMENTS]


def softmax_loss(
    problem: Problem, row_grad: Tensor | None, wanted: GradMask, backend: str
) -> Output:
    """The output of the registered op."""
    call = (*arguments_of(problem), row_grad, list(wanted), backend)
    loss, *gradients = torch.ops.dwl_kernels.softmax_loss(*call)
    return Output(loss, *[g if w else None for g, w in zip(gradients, wanted, strict=True)])


def scale(gradients: Sequence[Tensor], upstream: Tensor, dtypes: list[torch.dtype]) -> Any:
    """The output of the registered op."""
    places = [DTYPES.index(dtype) for dtype in dtypes]
    return torch.ops.dwl_kernels.scale(gradients, upstream, places)


def softmax_statistics(problem: Problem, backend: str) -> SoftmaxStatistics:
    """The output of the registered op."""
    call = torch.ops.dwl_kernels.softmax_statistics
    return SoftmaxStatistics(*call(*arguments_of(problem), backend))


def rank_targets(problem: RankProblem, backend: str) -> Tensor:
    """The output of the registered op."""
    found: Tensor = torch.ops.dwl_kernels.rank_targets(*problem, backend)
    return found


def solve(problem: Problem, row_grad: Tensor | None, wanted: GradMask, backend: str) -> Output:
    """What `softmax_loss` consists of."""
    run = backends.pick(backend, problem)
    if autocasting(problem.query.device.type):
        # The problem has been cast to its dtype already; the sums in between must not be.
        with no_autocast(problem.query.device.type):
            return run(problem, wanted, row_grad)
    return run(problem, wanted, row_grad)


def problem_of(fields: dict[str, Any]) -> Problem:
    """The problem of the arguments of the op."""
    dual = fields["dual"]
    if dual is not None:
        hardness, similarity, slate_size, competition = dual
        dual = DualScale(hardness, similarity, int(slate_size), competition)
    values = {**fields, "dual": dual}
    values["rows"] = RowOptions(**{name: fields[name] for name in RowOptions._fields})
    kind: Any = SharedProblem if fields["candidate_rows"] is None else PerRowProblem
    names = {f: _SHARED_NAMES.get(f, f) if kind is PerRowProblem else f for f in kind._fields}
    return kind(**{field: values[name] for field, name in names.items()})


def _arguments(args: Sequence[Any]) -> tuple[dict[str, Any], Tensor | None, list[bool], str]:
    *values, row_grad, wanted, backend = args
    return _fields(values), row_grad, wanted, backend


def _fields(values: Sequence[Any]) -> dict[str, Any]:
    return {argument.name: value for argument, value in zip(ARGUMENTS, values, strict=True)}


def _softmax_loss(*args: Any) -> tuple[Tensor, ...]:
    fields, row_grad, wanted, backend = _arguments(args)
    check_problem(fields, row_grad, wanted, backend)
    problem = problem_of(fields)
    output = solve(problem, row_grad, GradMask(*wanted), backend)
    # An op cannot return None; a gradient that is not wanted is an empty tensor.
    return tuple([problem.query.new_empty(0) if t is None else t for t in output])


def _fake_softmax_loss(*args: Any) -> tuple[Tensor, ...]:
    fields, _row_grad, wanted, _backend = _arguments(args)
    problem = problem_of(fields)
    want, rows = GradMask(*wanted), problem.rows
    accumulate, gradient = problem.dtypes
    products = problem.candidate_gradient
    if isinstance(problem, SharedProblem):
        positive, candidates = problem.positive, problem.candidates
    else:  # the gradients of the products
        positive, candidates = problem.query[:, 0], problem.candidate_rows

    def like(source: Tensor | None, dtype: torch.dtype, want: bool) -> Tensor:
        if source is None or not want:
            return problem.query.new_empty(0)
        return problem.query.new_empty(source.shape, dtype=dtype)

    shape = problem.query.shape[:1] if rows.reduction == "none" else ()
    return Output(
        loss=problem.query.new_empty(shape, dtype=accumulate),
        query=like(problem.query, gradient, want.query),
        positive=like(positive, products, want.positive),
        candidates=like(candidates, products, want.candidates),
        candidate_log_q=like(problem.candidate_log_q, accumulate, want.candidate_log_q),
        temperature=like(rows.temperature, accumulate, want.temperature),
        domain_weights=like(rows.domain_weights, accumulate, want.domain_weights),
    )  # type: ignore[return-value]


def _scale(gradients: list[Tensor], upstream: Tensor, places: list[int]) -> list[Tensor]:
    check_scale(gradients, upstream, places, DTYPES)
    return backends.scaled(gradients, upstream, [DTYPES[place] for place in places])


def _fake_scale(gradients: list[Tensor], upstream: Tensor, places: list[int]) -> list[Tensor]:
    return [
        g.new_empty(g.shape, dtype=DTYPES[place])
        for g, place in zip(gradients, places, strict=True)
    ]


def _softmax_statistics(*args: Any) -> tuple[Tensor, ...]:
    fields, backend = _fields(args[:-1]), args[-1]
    check_problem(fields, None, [False] * len(GradMask._fields), backend)
    problem = problem_of(fields)
    with no_autocast(problem.query.device.type):
        return backends.statistics(backend, problem)


def _fake_softmax_statistics(*args: Any) -> tuple[Tensor, ...]:
    query = _fields(args[:-1])["query"]
    rows = query.new_empty(query.shape[:1], dtype=accumulate_dtype(query.dtype))
    return rows, rows.clone(), query.new_empty(query.shape[:1], dtype=torch.int64)


def _rank_targets(*args: Any) -> Tensor:
    problem, backend = RankProblem(*args[:-1]), args[-1]
    check_ranks(problem, backend)
    with no_autocast(problem.query.device.type):
        found = backends.rank_targets(backend, problem)
    return found.clone() if found is problem.target else found


def _fake_rank_targets(*args: Any) -> Tensor:
    target = RankProblem(*args[:-1]).target
    return target.new_empty(target.shape)


_library.impl("softmax_loss", _softmax_loss, "CompositeExplicitAutograd")
torch.library.register_fake("dwl_kernels::softmax_loss", _fake_softmax_loss)
_library.impl("scale", _scale, "CompositeExplicitAutograd")
torch.library.register_fake("dwl_kernels::scale", _fake_scale)
_library.impl("softmax_statistics", _softmax_statistics, "CompositeExplicitAutograd")
torch.library.register_fake("dwl_kernels::softmax_statistics", _fake_softmax_statistics)
_library.impl("rank_targets", _rank_targets, "CompositeExplicitAutograd")
torch.library.register_fake("dwl_kernels::rank_targets", _fake_rank_targets)
for _name in ("softmax_loss", "scale", "softmax_statistics", "rank_targets"):
    register_by_slices(_library, _name)
