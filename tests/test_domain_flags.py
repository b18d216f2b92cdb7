"""Flags of domains become ids."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from dwl_kernels import (
    domains_from_multi_hot,
)

# ---------------------------------------------------------------- flags of domains


@pytest.mark.parametrize(
    "convert",
    [
        list,
        np.array,
        torch.tensor,
        lambda flags: np.array(flags, dtype=bool),
        lambda flags: np.array(flags, dtype=np.float32),
        lambda flags: np.array(flags, dtype=np.uint8),
        lambda flags: torch.tensor(flags).bool(),
        lambda flags: torch.tensor(flags).half(),
    ],
)
def test_flags_become_ids_in_increasing_order(convert: Any) -> None:
    flags = [[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1]]
    got = domains_from_multi_hot(convert(flags))
    assert got.dtype == torch.int64
    assert got.tolist() == [[1, 2, -1], [0, -1, -1], [-1, -1, -1], [0, 1, 3]]


def test_flags_of_pandas_become_ids_by_place() -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"drama": [1, 0], "noir": [True, False]}, index=[8, 3])
    for given in (frame, frame.astype("Int64"), frame.astype("boolean"), frame.astype(float)):
        assert domains_from_multi_hot(given).tolist() == [[0, 1], [-1, -1]]


def test_flags_keep_their_leading_dimensions_and_have_a_slot_at_least() -> None:
    assert domains_from_multi_hot([0, 1, 1]).tolist() == [1, 2]
    assert domains_from_multi_hot(torch.eye(3).expand(2, 3, 3)).tolist() == [[[0], [1], [2]]] * 2
    for shape in ((0, 5), (4, 0), (2, 3)):
        got = domains_from_multi_hot(torch.zeros(shape))
        assert got.shape == (shape[0], 1)
        assert (got == -1).all()


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ([[0, 2]], ValueError, "flags holds 2; wanted flags of 0 and 1"),
        ([[0, -1]], ValueError, "flags holds -1"),
        ([[0.5, 1]], ValueError, r"flags holds 0\.5"),
        ([[math.nan, 1]], ValueError, "flags holds nan"),
        ([["a"]], TypeError, "flags holds strings such as 'a'; wanted flags"),
        ([[0], [0, 1]], ValueError, "flags has rows of different lengths"),
        (None, TypeError, "flags is None"),
        (torch.tensor(1), ValueError, r"flags has shape \[\]; wanted \[\.\.\., C\]"),
        (torch.eye(2).to_sparse(), TypeError, r"flags has layout .*\.to_dense\(\)"),
    ],
)
def test_what_is_no_flags_is_named(flags: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        domains_from_multi_hot(flags)
