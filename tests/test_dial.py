"""Choosing the strength of the bonus, against counts by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dwl_kernels.dial import choose_bonus, ranks_with_bonus


def test_ranks_count_the_unseen_items_ahead() -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(5, (7, 9), generator=g).float()  # with ties
    targets, bonus = torch.randint(9, (7,), generator=g), torch.randn(9, generator=g)
    seen = torch.rand(7, 9, generator=g) < 0.3
    found = ranks_with_bonus(scores, targets, bonus, strengths=(0.0, 0.5, -2.0), seen=seen)
    for strength, ranks in found.items():
        for user, target in enumerate(targets.tolist()):
            served = (scores[user] + strength * bonus).tolist()
            ahead = [
                item
                for item in range(9)
                if item != target and not seen[user, item] and served[item] >= served[target]
            ]
            assert ranks[user] == len(ahead)


def test_item_that_is_left_out_by_an_infinite_bonus_counts_at_strength_zero() -> None:
    bonus = torch.tensor([-torch.inf, 0.0])
    found = ranks_with_bonus(
        torch.tensor([[2.0, 1.0]]), torch.tensor([1]), bonus, strengths=(0.0, 1.0)
    )
    assert [ranks.item() for ranks in found.values()] == [1, 0]


RANKS = {  # of two dense and two sparse targets; NDCG is 1, 0.63, 0.5 at ranks 0, 1, 2
    -1.0: torch.tensor([0, 0, 20, 20]),
    0.0: torch.tensor([0, 0, 2, 20]),
    0.5: torch.tensor([0, 1, 1, 2]),
    1.0: torch.tensor([2, 2, 0, 0]),
}
SPARSE = torch.tensor([False, False, True, True])


def test_strength_lifts_sparse_domains_most_at_the_price() -> None:
    free = choose_bonus(RANKS, SPARSE)
    assert free.strengths == (-1.0, 0.0, 0.5, 1.0)
    overall = [2.0, 2.5, 1 + 2 * 0.6309298 + 0.5, 3.0]
    assert free.overall == pytest.approx([one / 2.5 - 1 for one in overall], abs=1e-6)
    assert free.sparse == pytest.approx([-1, 0, (0.6309298 + 0.5) / 0.5 - 1, 3.0], abs=1e-6)
    assert free.strength == 1.0
    assert free.gain == pytest.approx(3.0)


def test_price_bounds_what_all_items_lose() -> None:
    ranks = {0.0: torch.tensor([0, 0, 9, 9]), 1.0: torch.tensor([1, 0, 2, 2])}
    ranks[2.0] = torch.tensor([2, 3, 0, 0])
    costly = torch.tensor([False, False, False, True])
    lost = choose_bonus(ranks, costly).overall
    assert choose_bonus(ranks, costly, price=0.0).strength == (2.0 if lost[2] >= 0 else 1.0)
    worse = {0.0: torch.tensor([0, 0, 5, 5]), 1.0: torch.tensor([9, 9, 4, 4])}
    assert choose_bonus(worse, SPARSE).strength == 0.0
    assert choose_bonus(worse, SPARSE, price=0.9).strength == 1.0


def test_table_marks_the_chosen_strength() -> None:
    lines = str(choose_bonus(RANKS, SPARSE)).splitlines()
    assert [line.endswith("<- chosen") for line in lines] == [False] * 4 + [True]


def test_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    choose_bonus(RANKS, SPARSE, price=0.03).plot(tmp_path / "dial.png")
    assert (tmp_path / "dial.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": {1.0: RANKS[1.0]}}, "wanted 0 among them"),
        ({"sparse": SPARSE[:2]}, "wanted an entry per target in both"),
        ({"sparse": torch.zeros(4, dtype=torch.bool)}, "sparse marks no target"),
        ({"sparse": SPARSE, "k": 2}, "no target of a sparse domain is among the first 2"),
        ({"ranks": {0.0: torch.full((4,), 99)}}, "no target is among the first 10"),
        ({"ranks": {**RANKS, 0.0: RANKS[0.0] - 1}}, r"ranks\[0\] holds -1"),
        ({"ranks": {**RANKS, float("nan"): RANKS[0.0]}}, "wanted finite numbers"),
        ({"price": 1.0}, "price is 1.0"),
        ({"k": 0}, "k is 0"),
    ],
)
def test_what_cannot_be_chosen_from_is_named(change: dict, message: str) -> None:
    arguments = {"ranks": RANKS, "sparse": SPARSE, **change}
    with pytest.raises(ValueError, match=message):
        choose_bonus(**arguments)


@pytest.mark.parametrize("change", [{"k": 2.5}, {"k": "10"}, {"ranks": {"0": RANKS[0.0]}}])
def test_what_is_no_number_is_a_type_error(change: dict) -> None:
    with pytest.raises(TypeError):
        choose_bonus(**{"ranks": RANKS, "sparse": SPARSE, **change})


SCORES = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
TARGETS = torch.tensor([1, 0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_flags_and_numbers_raise_alike(dtype: torch.dtype) -> None:
    bonus, seen = torch.tensor([0, 1, 0]).to(dtype), torch.tensor([[0, 0, 0], [0, 0, 1]])
    for given in (seen, seen.bool()):
        found = ranks_with_bonus(SCORES, TARGETS, bonus, strengths=(0.0, 1.5), seen=given)
        assert {strength: ranks.tolist() for strength, ranks in found.items()} == {
            0.0: [1, 1],
            1.5: [0, 1],
        }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seen": torch.zeros(3)}, ValueError, r"seen has shape \[3\]; wanted \[2, 3\]"),
        ({"seen": torch.full((2, 3), 2)}, ValueError, "seen"),
        ({"targets": torch.tensor([1, 3])}, IndexError, "targets"),
        ({"targets": torch.tensor([1, -1])}, IndexError, "targets"),
        ({"bonus": torch.ones(3, dtype=torch.complex64)}, TypeError, "wanted real numbers"),
        ({"strengths": (0.0, float("inf"))}, ValueError, "wanted finite numbers"),
    ],
)
def test_what_cannot_be_ranked_is_named(change: dict, error: type[Exception], message: str) -> None:
    given = {"scores": SCORES, "targets": TARGETS, "bonus": torch.ones(3), **change}
    with pytest.raises(error, match=message):
        ranks_with_bonus(**given)
