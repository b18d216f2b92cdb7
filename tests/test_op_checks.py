"""The registered ops of all backends name what they do not take.

``torch.ops.dwl_kernels`` is open to anybody, and a saved graph may hold anything. Those of the
CPU kernels, below these, have a file of their own.
"""

from __future__ import annotations

import re

import pytest
import torch

from dwl_kernels.core.problem import DualScale, PerRowProblem, RowOptions, SharedProblem
from dwl_kernels.ops import ARGUMENTS, arguments_of, problem_of
from dwl_kernels.ops import DTYPES as _DTYPES

B, N, D, V, K = 3, 5, 4, 7, 2
INT = torch.int64


def softmax_loss(**changed):
    """The op on 3 rows, their positives and 5 candidates, every gradient wanted that there is."""
    arguments = {
        "query": torch.ones(B, D),
        "positive": torch.ones(B, D),
        "candidates": torch.ones(N, D),
        "target": None,
        "candidate_rows": None,
        "positive_log_q": torch.zeros(B),
        "candidate_log_q": torch.zeros(N),
        "positive_ids": torch.arange(B),
        "candidate_ids": torch.arange(N),
        "query_ids": torch.arange(B),
        "candidate_query_ids": torch.arange(N),
        "domain_ids": torch.zeros(B, 1, dtype=INT),
        "domain_weights": torch.ones(2),
        "example_weights": torch.ones(B),
        "temperature": torch.ones(B),
        "competition_factor": None,
        "tau": 1.0,
        "ignore_index": -100,
        "correction": "standard",
        "reduction": "mean",
        "skip_threshold": 0.0,
        "dual": None,
        "row_grad": None,
        "wanted": [True] * 6,
        "backend": "eager",
    }
    arguments.update(changed)
    return torch.ops.dwl_kernels.softmax_loss(*arguments.values())


IDS = ("positive_ids", "candidate_ids", "query_ids", "candidate_query_ids")
NOTHING = dict.fromkeys(("positive_log_q", *IDS))
FULL = {
    **{**NOTHING, "positive": None, "target": torch.tensor([0, 1, 4])},
    "wanted": [True, False, True, True, True, True],
}
BY_ROW = {
    **{**FULL, "candidate_rows": torch.tensor([[1, 2]] * B), "candidate_log_q": None},
    "wanted": [True, True, True, False, True, True],
}


def full(**changed):
    """The op where the candidates are a table and every row has a target."""
    return softmax_loss(**{**FULL, **changed})


def per_row(**changed):
    """The op where every row draws 2 candidates from a table."""
    return softmax_loss(**{**BY_ROW, **changed})


def scale(**changed):
    """The op on one gradient."""
    arguments = {"gradients": [torch.ones(B, D)], "upstream": torch.tensor(2.0), "dtypes": [1]}
    return torch.ops.dwl_kernels.scale(*{**arguments, **changed}.values())


def table_gradient(**changed):
    """The op on 3 rows with 2 places each in a table of 7 rows."""
    arguments = {
        "source": torch.ones(B, D),
        "ids": [torch.tensor([[0, 1], [1, 2], [2, 3]])],
        "coefficients": [torch.ones(B, K)],
        "table_rows": V,
        "dtype": torch.float32,
        "compact": False,
        "backend": "eager",
    }
    return torch.ops.dwl_kernels.table_gradient(*{**arguments, **changed}.values())


def rank_targets(**changed):
    """The op on 3 rows and a table of 7, of which the last row has seen two."""
    arguments = {
        "query": torch.ones(B, D),
        "item_table": torch.ones(V, D),
        "target": torch.tensor([0, 6, -100]),
        "bias": torch.zeros(V),
        "seen_offsets": torch.tensor([0, 0, 0, 2]),
        "seen_ids": torch.tensor([1, 5]),
        "ignore_index": -100,
        "backend": "eager",
    }
    return torch.ops.dwl_kernels.rank_targets(*{**arguments, **changed}.values())


WRONG = {
    rank_targets: [
        ({"query": torch.ones(D)}, ValueError, "query has shape [4]; wanted [B, D]"),
        ({"query": torch.ones(B, D, dtype=INT)}, TypeError, "query has dtype torch.int64"),
        ({"item_table": torch.ones(V, D + 1)}, ValueError, "item_table has shape [7, 5]"),
        ({"item_table": torch.ones(V, D).double()}, TypeError, "item_table has dtype"),
        ({"item_table": torch.ones(0, D)}, ValueError, "item_table has shape [0, 4]"),
        ({"target": torch.zeros(N, dtype=INT)}, ValueError, "target has shape [5]"),
        ({"target": torch.zeros(B).int()}, TypeError, "target has dtype torch.int32"),
        ({"bias": torch.zeros(B)}, ValueError, "bias has shape [3]; wanted [7]"),
        ({"seen_offsets": torch.zeros(B, dtype=INT)}, ValueError, "seen_offsets has shape [3]"),
        ({"seen_offsets": None}, ValueError, "one of seen_offsets and seen_ids"),
        ({"seen_ids": torch.zeros(2, 2, dtype=INT)}, ValueError, "seen_ids has shape [2, 2]"),
        ({"backend": "none"}, ValueError, "backend is 'none'"),
    ],
    softmax_loss: [
        ({"query": torch.ones(D)}, ValueError, "query has shape [4]; wanted [B, D]"),
        ({"query": torch.ones(B, 0)}, ValueError, "query has embeddings of size 0"),
        ({"query": torch.ones(B, D, dtype=INT)}, TypeError, "query has dtype torch.int64"),
        ({"query": torch.ones(B, D).to_sparse()}, TypeError, "query has layout torch.sparse_coo"),
        ({"positive": torch.ones(B, D + 1)}, ValueError, "positive has shape [3, 5]"),
        ({"positive": torch.ones(B, D).double()}, TypeError, "positive has dtype torch.float64"),
        ({"candidates": torch.ones(N, D - 1)}, ValueError, "candidates has shape [5, 3]"),
        ({"candidates": torch.ones(D)}, ValueError, "candidates has shape [4]"),
        ({"positive_log_q": torch.ones(N)}, ValueError, "positive_log_q has shape [5]"),
        ({"candidate_log_q": torch.ones(B)}, ValueError, "candidate_log_q has shape [3]"),
        ({"candidate_log_q": torch.ones(N).half()}, TypeError, "candidate_log_q has dtype"),
        ({"candidate_log_q": None}, ValueError, "the gradient of candidate_log_q is wanted"),
        ({"positive_ids": torch.arange(N)}, ValueError, "positive_ids has shape [5]"),
        ({"positive_ids": None}, ValueError, "one of positive_ids and candidate_ids"),
        ({"positive_ids": torch.arange(B).int()}, ValueError, "have different dtypes"),
        ({"candidate_ids": torch.ones(N)}, TypeError, "candidate_ids has dtype torch.float32"),
        ({"domain_ids": torch.zeros(B, dtype=INT)}, ValueError, "domain_ids has shape [3]"),
        ({"domain_ids": None}, ValueError, "one of domain_ids and domain_weights"),
        ({"domain_weights": torch.ones(0)}, ValueError, "domain_weights has no domains"),
        ({"domain_ids": torch.full((B, 1), 2)}, IndexError, "2"),
        ({"example_weights": torch.ones(B, 1)}, ValueError, "example_weights has shape [3, 1]"),
        ({"example_weights": -torch.ones(B)}, ValueError, "weights must not be negative"),
        ({"temperature": torch.ones(N)}, ValueError, "temperature has shape [5]"),
        ({"temperature": torch.zeros(B)}, ValueError, "temperature is 0 in row 0"),
        ({"tau": 0.5}, ValueError, "tau and temperature are both given"),
        ({"tau": float("nan")}, ValueError, "tau is nan"),
        ({"positive": None}, ValueError, "the gradient of positive is wanted"),
        (
            {"positive": None, "wanted": [False] * 6, "candidates": torch.ones(2, D)},
            ValueError,
            "candidate_log_q has shape [5]; wanted [2]",
        ),
        (
            {
                **{**NOTHING, "positive": None, "wanted": [False] * 6},
                **{"candidates": torch.ones(2, D), "candidate_log_q": None},
            },
            ValueError,
            "in a batch 2 candidates are less than 3 positives",
        ),
        ({"target": torch.zeros(B, dtype=INT)}, ValueError, "positive and target are both given"),
        ({"candidate_rows": torch.zeros(B, K, dtype=INT)}, ValueError, "candidate_"),
        ({"correction": "none"}, ValueError, "correction is 'none'"),
        ({"reduction": "average"}, ValueError, "reduction is 'average'"),
        ({"backend": "cuda2"}, ValueError, "backend is 'cuda2'"),
        ({"skip_threshold": 0.1}, ValueError, "skip_threshold is 0.1"),
        ({"dual": [1.0, 1.0]}, ValueError, "dual has 2 numbers; wanted 4"),
        ({"dual": [1.0, float("nan"), 4.0, 1.0]}, ValueError, "wanted finite strengths"),
        ({"dual": [1.0, 1.0, 0.0, 1.0]}, ValueError, "a slate of at least 1"),
        ({"dual": [1.0, 1.0, float("inf"), 1.0]}, (ValueError, OverflowError), "inf"),
        ({"row_grad": torch.ones(B)}, ValueError, "row_grad is given with reduction 'mean'"),
        ({"reduction": "none"}, ValueError, "wanted without row_grad"),
        (
            {"reduction": "none", "row_grad": torch.ones(N)},
            ValueError,
            "row_grad has shape [5]; wanted [3]",
        ),
        ({"wanted": [True] * 5}, ValueError, "wanted has 5 entries; wanted 6"),
    ],
    full: [
        ({"target": torch.zeros(N, dtype=INT)}, ValueError, "target has shape [5]; wanted [3]"),
        ({"target": torch.zeros(B)}, TypeError, "target has dtype torch.float32"),
        ({"target": torch.tensor([0, N, 1])}, IndexError, "target holds 5"),
        ({"target": torch.tensor([0, -1, 1])}, IndexError, "target holds -1"),
        (
            {"candidates": torch.ones(0, D), "candidate_log_q": torch.ones(0)},
            ValueError,
            "candidates has no rows",
        ),
        ({"correction": "refined"}, ValueError, "no log-Q to refine"),
        ({"positive_log_q": torch.zeros(B)}, ValueError, "positive_log_q is given together"),
        ({"dual": [1.0, 1.0, 4.0, 1.0]}, ValueError, "the dual scale takes no target"),
        ({"skip_threshold": -1.0}, ValueError, "skip_threshold is -1.0"),
    ],
    per_row: [
        ({"candidate_rows": torch.zeros(N, K, dtype=INT)}, ValueError, "candidate_rows has shape"),
        ({"candidate_rows": torch.zeros(B, dtype=INT)}, ValueError, "candidate_rows has shape"),
        ({"candidate_rows": torch.full((B, K), N)}, IndexError, "negative_ids holds 5"),
        ({"target": torch.full((B,), -1)}, IndexError, "positive_ids holds -1"),
        ({"target": None}, ValueError, "candidate_rows is given without target"),
        (
            {"positive_ids": torch.arange(B), "candidate_ids": torch.arange(N)},
            ValueError,
            "ids are given together with candidate_rows",
        ),
        ({"candidate_log_q": torch.zeros(N)}, ValueError, "candidate_log_q has shape [5]"),
        (
            {"candidate_log_q": torch.zeros(B, K), "wanted": [True] * 6},
            ValueError,
            "no gradient of candidate_log_q",
        ),
        ({"dual": [1.0, 1.0, 4.0, 1.0]}, ValueError, "the dual scale takes no target"),
    ],
    scale: [
        ({"dtypes": []}, ValueError, "for each of the 1 gradients"),
        ({"dtypes": [len(_DTYPES)]}, ValueError, "wanted a number from 0 to 3"),
        ({"dtypes": [-1]}, ValueError, "wanted a number from 0 to 3"),
        ({"gradients": []}, ValueError, "for each of the 0 gradients"),
        ({"upstream": torch.ones(B)}, ValueError, "upstream has shape [3]"),
        ({"upstream": torch.tensor(1)}, ValueError, "dtype torch.int64; wanted a scalar"),
        ({"gradients": [torch.arange(B)]}, TypeError, "gradients[0] has dtype torch.int64"),
        ({"gradients": [torch.ones(B).to_sparse()]}, TypeError, "gradients[0] has layout"),
    ],
    table_gradient: [
        ({"ids": [], "coefficients": []}, ValueError, "ids is an empty list"),
        ({"ids": []}, ValueError, "ids is an empty list"),
        ({"source": torch.ones(B, 0)}, ValueError, "source has 0 columns"),
        ({"source": torch.ones(B)}, ValueError, "source has shape [3]"),
        ({"source": torch.ones(B, D, dtype=INT)}, TypeError, "source has dtype torch.int64"),
        ({"table_rows": -1}, ValueError, "table_rows is -1"),
        ({"dtype": INT}, TypeError, "dtype is torch.int64"),
        ({"ids": [torch.zeros(N, K, dtype=INT)]}, ValueError, "ids[0] has shape [5, 2]"),
        ({"ids": [torch.zeros(B, dtype=INT)]}, ValueError, "ids[0] has shape [3]"),
        ({"ids": [torch.zeros(B, K)]}, TypeError, "ids[0] has dtype torch.float32"),
        ({"ids": [torch.zeros(B, K).int()]}, TypeError, "ids[0] has dtype torch.int32"),
        ({"coefficients": [torch.ones(B, K)] * 2}, ValueError, "2 of coefficients"),
        ({"coefficients": [torch.ones(B, 1)]}, ValueError, "coefficients[0] has shape [3, 1]"),
        ({"coefficients": [torch.ones(B, K, dtype=INT)]}, TypeError, "coefficients[0] has dtype"),
        ({"backend": "none"}, ValueError, "backend is 'none'"),
    ],
}


@pytest.mark.parametrize(
    ("op", "changed", "error", "message"),
    [
        pytest.param(op, *case, id=f"{op.__name__}: {case[-1]}")
        for op, cases in WRONG.items()
        for case in cases
    ],
)
def test_op_names_what_it_does_not_take(op, changed, error, message):
    op()  # all else is right
    with pytest.raises(error, match=re.escape(message)):
        op(**changed)


@pytest.mark.parametrize("backend", ["eager", "chunked", "cpu", "triton"], indirect=True)
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("bad", [-1, V, 1 << 40])
def test_place_outside_the_table_is_left_out(backend, bad, compact):
    """A padded row may hold any id, and its coefficient is 0; nothing is written for it."""
    ids = [torch.tensor([[0, 1], [1, bad], [bad, 3]])]
    values, distinct = table_gradient(ids=ids, compact=compact, backend=backend)
    wanted = torch.zeros(V, D)
    wanted[torch.tensor([0, 1, 3])] = torch.tensor([[1.0], [2.0], [1.0]])
    assert distinct.tolist() == ([0, 1, 3] if compact else [])
    assert torch.equal(values, wanted[distinct] if compact else wanted)


def test_ops_of_empty_lists_and_sizes():
    assert scale(gradients=[], dtypes=[]) == []
    none = torch.zeros(B, 0, dtype=INT)
    for compact in (False, True):
        values, distinct = table_gradient(ids=[none], coefficients=[], compact=compact)
        assert values.shape == (0 if compact else V, D)
        assert not values.any()
        assert not len(distinct)
    assert table_gradient(table_rows=0)[0].shape == (0, D)
    loss, *gradients = softmax_loss(
        candidates=torch.ones(0, D),
        candidate_log_q=torch.ones(0),
        candidate_ids=torch.arange(0),
        candidate_query_ids=torch.arange(0),
    )
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


OF_ROWS = RowOptions(
    *(torch.ones(B, 1), torch.ones(2), torch.ones(B), torch.ones(()), torch.ones(B)),
    *(0.3, 5, "refined", "weighted_mean"),
)
PROBLEMS = [
    SharedProblem(
        *(torch.full((1,), float(place)) for place in range(10)),
        rows=OF_ROWS,
        skip_threshold=0.1,
        dual=DualScale(0.2, 0.4, 3, 0.6),
    ),
    PerRowProblem(*(torch.full((1,), float(place)) for place in range(6)), rows=OF_ROWS),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: type(problem).__name__)
def test_arguments_of_the_op_are_the_problem_again(problem):
    """Every field has a value of its own, so that none can take the place of another."""
    names = [argument.name for argument in ARGUMENTS]
    again = problem_of(dict(zip(names, arguments_of(problem), strict=True)))
    assert type(again) is type(problem)
    assert all(one is other for one, other in zip(again.tensors(), problem.tensors(), strict=True))
    none = [None] * len(problem.tensors())
    assert again.with_tensors(none) == problem.with_tensors(none)
