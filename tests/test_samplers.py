"""Samplers and stream estimates: what they draw and what they say about it must agree."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_frequency import STREAMS
from torch import Tensor

from dwl_kernels.frequency import CountMinSketch, StreamingFrequency
from dwl_kernels.samplers import LogUniformSampler, UniformSampler, UnigramSampler, _log_uniform_ids

# Small enough that 200,000 draws put hundreds of them on the rarest item, so that the chi-square
# statistic is close to its limit; 37 is no power of two.
NUM_ITEMS = 37
COUNTS = torch.tensor([(7 * k) % 12 for k in range(NUM_ITEMS)])  # zeros at 0, 12, 24, 36
SAMPLERS = {
    "uniform": lambda: UniformSampler(NUM_ITEMS),
    "log-uniform": lambda: LogUniformSampler(NUM_ITEMS),
    "unigram": lambda: UnigramSampler(COUNTS, power=0.75),
}


def expected_probabilities(name: str) -> np.ndarray:
    k = np.arange(NUM_ITEMS, dtype=np.float64)
    if name == "uniform":
        return np.full(NUM_ITEMS, 1 / NUM_ITEMS)
    if name == "log-uniform":
        return np.log((k + 2) / (k + 1)) / np.log(NUM_ITEMS + 1)
    weights = COUNTS.double().numpy() ** 0.75
    return weights / weights.sum()


def table_mass(sampler: UnigramSampler) -> np.ndarray:
    """Probability of every item, summed over the cells of the alias table."""
    mass = sampler.probability.clone()
    mass.index_add_(0, sampler.alias.long(), 1 - sampler.probability)
    return (mass / sampler.num_items).numpy()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- samplers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_log_q_is_the_formula(name: str) -> None:
    log_q = SAMPLERS[name]().log_q(torch.arange(NUM_ITEMS))
    assert log_q.dtype == torch.float32
    np.testing.assert_allclose(log_q.double().exp(), expected_probabilities(name), rtol=1e-6)
    assert math.isclose(log_q.double().exp().sum().item(), 1, rel_tol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_draws_follow_log_q(name: str) -> None:
    sampler = SAMPLERS[name]()
    draws = 200_000
    ids, log_q = sampler.sample(draws, generator=seeded())
    assert torch.equal(log_q, sampler.log_q(ids))
    observed = torch.bincount(ids, minlength=NUM_ITEMS).double().numpy()
    expected = draws * sampler.log_q(torch.arange(NUM_ITEMS)).double().exp().numpy()
    drawable = expected > 0
    assert observed[~drawable].sum() == 0
    chi_square = ((observed - expected)[drawable] ** 2 / expected[drawable]).sum()
    freedom = drawable.sum() - 1  # mean of the statistic; its variance is twice that
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("name", SAMPLERS)
def test_generator_makes_draws_reproducible(name: str) -> None:
    sampler = SAMPLERS[name]()
    first, _ = sampler.sample(1000, generator=seeded(5))
    again, _ = sampler.sample(1000, generator=seeded(5))
    other, _ = sampler.sample(1000, generator=seeded(6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sample_takes_a_shape(name: str) -> None:
    sampler = SAMPLERS[name]()
    flat, _ = sampler.sample(12, generator=seeded())
    ids, log_q = sampler.sample((3, 4), generator=seeded())
    assert torch.equal(ids, flat.view(3, 4))
    assert torch.equal(log_q, sampler.log_q(ids))
    assert (ids.dtype, log_q.dtype) == (torch.int64, torch.float32)
    assert [tuple(t.shape) for t in sampler.sample((0, 2))] == [(0, 2), (0, 2)]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("bad", [-1, NUM_ITEMS, 2**40])
def test_out_of_range_id_is_named_on_cpu(name: str, bad: int) -> None:
    with pytest.raises(IndexError, match=rf"{bad}.*\[0, {NUM_ITEMS}\)"):
        SAMPLERS[name]().log_q(torch.tensor([0, bad]))


@pytest.mark.parametrize("name", SAMPLERS)
def test_out_of_range_id_is_nan_where_a_check_would_wait(name: str) -> None:
    # The compiled graph takes the way that CUDA takes: no check, a clamped read, NaN.
    sampler = SAMPLERS[name]()
    log_q = torch.compile(sampler.log_q, backend="eager", fullgraph=True)
    got = log_q(torch.tensor([1, -1, NUM_ITEMS]))
    assert got[0] == sampler.log_q(torch.tensor([1]))
    assert got[1:].isnan().all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_reads_nothing_back_to_the_host(name: str) -> None:
    # Tensors on `meta` have no values: whatever reads one, or needs one for a shape, raises.
    sampler = SAMPLERS[name]().to("meta")
    ids, log_q = sampler.sample((5, 2))
    assert ids.device.type == log_q.device.type == "meta"
    assert sampler.log_q(ids).shape == (5, 2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_follows_from_its_arguments_and_not_from_a_checkpoint(name: str) -> None:
    sampler = SAMPLERS[name]()
    assert len(sampler.state_dict()) == 0
    model = torch.nn.ModuleDict({"tower": torch.nn.Linear(2, 2), "sampler": sampler})
    want = sampler.sample(100, generator=seeded())
    model.load_state_dict(model.state_dict())
    twins = (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler)), sampler)
    for twin in twins:
        for one, other in zip(want, twin.sample(100, generator=seeded()), strict=True):
            assert torch.equal(one, other)


def test_half_precision_model_keeps_exact_probabilities() -> None:
    sampler = UnigramSampler(COUNTS)
    names = ("probability", "alias", "log_probability")
    before = {name: getattr(sampler, name).clone() for name in names}
    torch.nn.ModuleList([sampler]).to(torch.bfloat16)
    for name in names:
        assert getattr(sampler, name).dtype == before[name].dtype
        assert torch.equal(getattr(sampler, name), before[name])


def test_small_and_large_integer_ids_look_up_alike() -> None:
    sampler = UnigramSampler(COUNTS)
    ids = torch.tensor([1, 5, 35])
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        assert torch.equal(sampler.log_q(ids.to(dtype)), sampler.log_q(ids))


def test_uniform_has_no_bias_of_a_32_bit_remainder() -> None:
    # 3 * 2^26 items are just below the size at which torch.randint moves on to 64 bits: it draws
    # the first third of the ids at 0.34375, a hundred standard errors away at these 5 * 10^6 draws.
    num_items, draws = 3 * 2**26, 5_000_000
    ids, _ = UniformSampler(num_items).sample(draws, generator=seeded())
    share = (ids < num_items // 3).double().mean().item()
    assert abs(share - 1 / 3) < 4 * math.sqrt(2 / 9 / draws)


def test_log_uniform_with_2_to_the_40_items_stays_in_range() -> None:
    num_items, draws = 2**40, 200_000
    sampler = LogUniformSampler(num_items)
    ids, log_q = sampler.sample(draws, generator=seeded())
    assert ids.min() >= 0
    assert ids.max() < num_items
    assert ids.max() > 2**38  # the last two octaves hold a twentieth of the draws
    assert log_q.isfinite().all()
    # The share of [2^31, 2^40) is log((2^40 + 1) / (2^31 + 1)) / log(2^40 + 1), nearly 9/40.
    share = math.log((2**40 + 1) / (2**31 + 1)) / math.log(2**40 + 1)
    error = math.sqrt(share * (1 - share) / draws)
    assert abs((ids >= 2**31).double().mean().item() - share) < 4 * error
    # 1/(k+2) < log((k+2)/(k+1)) < 1/(k+1): for the last id log1p is the reciprocal.
    want = -math.log(num_items) - math.log(math.log(num_items + 1))
    assert math.isclose(sampler.log_q(torch.tensor([num_items - 1])).item(), want, rel_tol=1e-6)


@pytest.mark.parametrize("num_items", [1, 2, 3, 1000, 2**31 + 11, 2**40])
def test_log_uniform_is_right_at_the_borders(num_items: int) -> None:
    # Borders and the doubles a few units in the last place around them, where exp alone slips.
    last = num_items - 1
    ids = torch.tensor(sorted({k for k in (0, 1, 2, 7, 999, 2**31, last) if k <= last}))
    border = torch.log1p(ids.double()) / math.log1p(num_items)  # CDF below id k
    width = torch.log1p((ids + 1.0).reciprocal()) / math.log1p(num_items)
    assert torch.equal(_log_uniform_ids(border + width / 8, num_items), ids)
    assert torch.equal(_log_uniform_ids(border + width * 7 / 8, num_items), ids)
    assert _log_uniform_ids(torch.zeros(1, dtype=torch.float64), num_items).item() == 0
    below_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert _log_uniform_ids(below_one, num_items).item() == last


def test_log_uniform_gives_each_double_beside_a_border_to_the_right_id() -> None:
    # floor(exp(t)) alone falls short of the id at half of these borders. PyTorch's logarithm on
    # both sides: NumPy's is one unit in the last place away from it on some processors.
    num_items = 1000
    one = torch.ones((), dtype=torch.float64)
    border = torch.log1p(torch.arange(1, num_items).double()) / math.log1p(num_items)
    for _ in range(3):
        border = torch.nextafter(border, 0 * one)
    for _ in range(7):
        target = border * math.log1p(num_items)
        ids = _log_uniform_ids(border, num_items).double()
        assert (torch.log1p(ids) <= target).all()
        assert (target < torch.log1p(ids + 1)).all()
        border = torch.nextafter(border, one)


def test_log_uniform_ids_are_the_inverse_of_the_cdf() -> None:
    uniform = torch.rand(100_000, dtype=torch.float64, generator=seeded())
    cdf = torch.log(torch.arange(2, 1002).double()) / math.log(1001)
    want = torch.searchsorted(cdf, uniform, right=True)
    assert torch.equal(_log_uniform_ids(uniform, 1000), want)


# --- unigram --------------------------------------------------------------------------------------

counts_lists = st.lists(
    st.one_of(st.just(0.0), st.integers(1, 10).map(float), st.floats(1e-6, 1e12)),
    min_size=1,
    max_size=200,
).filter(any)


@settings(max_examples=300, deadline=None)
@given(counts_lists, st.sampled_from([0.0, 0.5, 0.75, 1.0, 2.0]))
def test_alias_table_holds_the_exact_distribution(counts: list[float], power: float) -> None:
    sampler = UnigramSampler(torch.tensor(counts, dtype=torch.float64), power)
    top = max(counts)
    weights = np.array([(c / top) ** power if c > 0 else 0.0 for c in counts])
    want = weights / math.fsum(weights)
    np.testing.assert_allclose(table_mass(sampler), want, rtol=1e-12, atol=0)
    log_q = sampler.log_q(torch.arange(len(counts))).double()
    np.testing.assert_allclose(log_q.exp(), want, rtol=2e-5)  # float32 logs down to -72
    assert ((sampler.probability >= 0) & (sampler.probability <= 1)).all()
    # A cell of a zero count must always hand over, and always to an item with a count.
    zero = torch.tensor(counts) == 0
    assert (sampler.probability[zero] == 0).all()
    assert not zero[sampler.alias.long()[sampler.probability < 1]].any()


@pytest.mark.parametrize("num_items", [2, 365, 3000, 2**20 + 1])
def test_near_uniform_counts_keep_the_surplus_of_the_heaviest(num_items: int) -> None:
    # Deficits of 1e-9 would be lost one by one in float32, and with them the heavy item's surplus;
    # as integers that are rounded alike they would pile up to 1e-8 in it. The table's unit is
    # 2^-41 = 5e-13 at the largest size.
    counts = torch.ones(num_items, dtype=torch.float64)
    counts[num_items // 3] += 1e-9 * num_items
    want = (counts / counts.sum()).numpy()
    np.testing.assert_allclose(table_mass(UnigramSampler(counts)), want, rtol=2e-12)


def test_power_zero_is_uniform_over_the_counted_items() -> None:
    sampler = UnigramSampler(torch.tensor([5, 0, 1, 900]), power=0)
    log_q = sampler.log_q(torch.arange(4))
    np.testing.assert_allclose(log_q.exp(), [1 / 3, 0, 1 / 3, 1 / 3], rtol=1e-6)
    assert log_q[1] == -math.inf


def test_huge_power_and_huge_counts_do_not_overflow() -> None:
    sampler = UnigramSampler(torch.tensor([1e300, 5e299], dtype=torch.float64), power=50)
    want = [-math.log1p(0.5**50), -50 * math.log(2)]
    np.testing.assert_allclose(sampler.log_q(torch.arange(2)), want, rtol=1e-6, atol=1e-12)
    assert (sampler.sample(1000)[0] == 0).all()


def test_one_item_is_certain() -> None:
    ids, log_q = UnigramSampler(torch.tensor([3])).sample(10)
    assert (ids == 0).all()
    assert (log_q == 0).all()


def test_unigram_draws_ids_above_2_to_the_24() -> None:
    # float32 has no odd integers above 2^24, and torch.multinomial refuses that many items. The
    # last five items hold 15/16 of the mass, so every wrong id among them shows.
    base = 2**24
    counts = torch.ones(base + 5)
    counts[base:] = base * torch.arange(1.0, 6.0)
    sampler = UnigramSampler(counts)
    top = torch.arange(base, base + 5)
    want = torch.arange(1, 6).double() / 16
    np.testing.assert_allclose(sampler.log_q(top).double().exp(), want, rtol=1e-6)
    draws = 100_000
    ids, _ = sampler.sample(draws, generator=seeded())
    share = (ids[:, None] == top).double().mean(0)
    assert ((share - want).abs() < 4 * (want * (1 - want) / draws).sqrt()).all()
    mass = table_mass(sampler)
    np.testing.assert_allclose(mass[base:], want, rtol=1e-10)
    np.testing.assert_allclose(mass[: base : base // 64], 1 / (16 * base), rtol=1e-10)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [*SAMPLERS.values(), *(lambda f=f: f(0) for f in STREAMS.values())]
)
@pytest.mark.parametrize("ids", [torch.zeros(2), torch.zeros(2, dtype=torch.bool), [0, 1]])
def test_ids_that_are_no_integer_tensor_are_a_type_error(make, ids) -> None:  # type: ignore[no-untyped-def]
    module = make()
    with pytest.raises(TypeError, match=r"ids is .*integer tensor"):
        module.log_q(ids)
    if hasattr(module, "update"):
        with pytest.raises(TypeError, match=r"ids is .*integer tensor"):
            module.update(ids)


@pytest.mark.parametrize(
    "make", [*SAMPLERS.values(), *(lambda f=f: f(0) for f in STREAMS.values())]
)
def test_ids_on_another_device_are_a_value_error(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="ids is on meta, wanted cpu"):
        make().log_q(torch.zeros(2, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("sampler", [UniformSampler, LogUniformSampler])
@pytest.mark.parametrize("num_items", [0, -3, 2**48 + 1])
def test_catalogue_of_impossible_size_is_refused(sampler, num_items: int) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=f"num_items is {num_items}"):
        sampler(num_items)


@pytest.mark.parametrize(
    ("counts", "error", "match"),
    [
        (torch.tensor([1.0, -1.0]), ValueError, "negative"),
        (torch.tensor([1, -1]), ValueError, "negative"),
        (torch.tensor([1.0, math.nan]), ValueError, "NaN"),
        (torch.tensor([1.0, math.inf]), ValueError, "infinite"),
        (torch.zeros(3), ValueError, "zero everywhere"),
        (torch.empty(0), ValueError, "with an item or more"),
        (torch.ones(2, 2), ValueError, r"counts is \(2, 2\)"),
        (torch.ones(2, dtype=torch.bool), TypeError, "counts is torch.bool"),
        (torch.ones(2, dtype=torch.complex64), TypeError, "counts is torch.complex64"),
    ],
)
def test_counts_that_are_no_counts_are_refused(
    counts: Tensor, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        UnigramSampler(counts)


@pytest.mark.parametrize("power", [0.0, 0.75, 3.0])
def test_weights_multiply_what_is_drawn_and_log_q_says_so(power: float) -> None:
    counts, weights = torch.tensor([6, 0, 2, 5]), torch.tensor([1.0, 2.0, 3.0, 0.0])
    sampler = UnigramSampler(counts, power, weights=weights)
    want = np.array([6.0**power, 0, 3 * 2.0**power, 0])
    np.testing.assert_allclose(table_mass(sampler), want / want.sum(), rtol=2e-12)
    found = sampler.log_q(torch.arange(4))
    torch.testing.assert_close(found.exp().double(), torch.from_numpy(want / want.sum()))
    assert found.tolist()[1::2] == [-math.inf, -math.inf]
    # Only their ratios matter, and none overflows.
    huge = UnigramSampler(counts * 10**15, power, weights=weights.double() * 1e300)
    torch.testing.assert_close(huge.log_q(torch.arange(4)), found)
    ids, log_q = sampler.sample(1000, generator=torch.Generator().manual_seed(0))
    assert set(ids.tolist()) == {0, 2}
    assert torch.equal(log_q, found[ids])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -1.0, 1.0], "weights holds a negative"),
        ([1.0, 1.0], r"weights is \(2,\), wanted \(3,\)"),
        ([0.0, 1.0, 0.0], "weights is zero for every item that was counted"),
        ([0.0, 0.0, 0.0], "weights is zero everywhere"),
    ],
)
def test_weights_that_draw_nothing_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UnigramSampler(torch.tensor([3, 0, 2]), weights=weights)


@pytest.mark.parametrize("power", [-0.5, math.nan, math.inf])
def test_power_out_of_range_is_refused(power: float) -> None:
    with pytest.raises(ValueError, match="power is"):
        UnigramSampler(torch.ones(3), power)


@pytest.mark.parametrize("name", SAMPLERS)
def test_number_of_draws_is_checked(name: str) -> None:
    sampler = SAMPLERS[name]()
    for n in (-1, (2, -1)):
        with pytest.raises(ValueError, match=r"n is .*negative"):
            sampler.sample(n)
    for n in (2.0, True, "3", (1, 2.5)):
        with pytest.raises(TypeError, match="n is "):
            sampler.sample(n)


def test_flag_of_a_generator_is_looked_at_without_a_group_too() -> None:
    with pytest.raises(TypeError, match="same_on_all_ranks is a str"):
        UniformSampler(4).generator(0, same_on_all_ranks="no")  # type: ignore[arg-type]


def test_generator_of_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="generator is on cpu, the sampler on meta"):
        UniformSampler(4).to("meta").sample(2, generator=torch.Generator())


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: UniformSampler(2.0), TypeError),  # type: ignore[arg-type]
        (lambda: UniformSampler(True), TypeError),
        (lambda: StreamingFrequency(0), ValueError),
        (lambda: StreamingFrequency(8, num_hashes=0), ValueError),
        (lambda: StreamingFrequency(8, learning_rate=0), ValueError),
        (lambda: StreamingFrequency(8, learning_rate=1.5), ValueError),
        (lambda: StreamingFrequency(8, initial_gap=0.5), ValueError),
        (lambda: StreamingFrequency(8, initial_gap=math.nan), ValueError),
        (lambda: StreamingFrequency(8, batch_size=0), ValueError),
        (lambda: CountMinSketch(0), ValueError),
        (lambda: CountMinSketch(8, 0), ValueError),
        (lambda: CountMinSketch(8, seed=0.5), TypeError),  # type: ignore[arg-type]
    ],
)
def test_arguments_out_of_range_are_refused(make, error: type[Exception]) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error):
        make()
