"""Stream estimates of log-Q against literal loops and known streams."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dwl_kernels.frequency import CountMinSketch, StreamingFrequency, _mix64
from dwl_kernels.samplers import LogUniformSampler


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- streaming frequency --------------------------------------------------------------------------


def literal_frequency(
    batches: list[list[int]], rate: float, initial_gap: float
) -> dict[int, float]:
    """Algorithm 2 as it stands in the paper, with an array cell for every id."""
    last: Counter[int] = Counter()
    gap: dict[int, float] = {}
    for step, batch in enumerate(batches, start=1):
        for item in sorted(set(batch)):
            gap[item] = (1 - rate) * gap.get(item, initial_gap) + rate * (step - last[item])
            last[item] = step
    return gap


def test_streaming_frequency_is_algorithm_2() -> None:
    batches = torch.randint(-40, 40, (60, 16), generator=seeded()).tolist()
    # 2^20 buckets for 80 ids: no two of them meet (checked), so the literal algorithm applies.
    frequency = StreamingFrequency(2**20, learning_rate=0.1, initial_gap=20)
    for batch in batches:
        frequency.update(torch.tensor(batch))
    want = literal_frequency(batches, 0.1, 20)
    ids = torch.tensor(sorted(want))
    assert frequency._buckets(ids).unique().numel() == ids.numel()
    gaps = [want[item] for item in ids.tolist()]
    np.testing.assert_allclose((-frequency.log_q(ids)).exp(), gaps, rtol=1e-5)


def test_first_gaps_average_to_the_share_of_batches() -> None:
    # 20 sightings are fewer than 1 / learning_rate: the mean gap is steps / sightings.
    frequency = StreamingFrequency(1024, learning_rate=0.01)
    steps = sorted(torch.randperm(500, generator=seeded())[:20].tolist())
    for step in range(steps[-1] + 1):
        frequency.update(torch.tensor([3] if step in steps else [4]))
    got = frequency.log_q(torch.tensor([3])).exp().item()
    assert math.isclose(got, 20 / (steps[-1] + 1), rel_tol=1e-5)


@pytest.mark.parametrize("initial_gap", [None, 50.0])
def test_periodic_id_converges_to_one_over_its_gap(initial_gap: float | None) -> None:
    frequency = StreamingFrequency(2**16, learning_rate=0.2, initial_gap=initial_gap)
    for step in range(1, 601):
        frequency.update(torch.tensor([period for period in (1, 3, 10) if step % period == 0]))
    got = frequency.log_q(torch.tensor([1, 3, 10])).exp()
    np.testing.assert_allclose(got, [1, 1 / 3, 1 / 10], rtol=1e-3)  # 49 (1 - 0.2)^60 = 7e-5


def test_estimate_follows_a_change_of_frequency() -> None:
    frequency = StreamingFrequency(64, learning_rate=0.1)
    for step in range(1, 1001):  # every second batch, later every fifth
        frequency.update(torch.tensor([9] if step % (2 if step <= 500 else 5) == 0 else []).long())
    assert math.isclose(frequency.log_q(torch.tensor(9)).exp().item(), 0.2, rel_tol=1e-3)


def test_more_hashes_repair_collisions() -> None:
    # 200 ids of period 20 in 512 buckets: a third of them shares its bucket with another, which
    # can only shorten the gap; four hashes leave (1/3)^4, about one in eighty.
    ids = torch.arange(200)
    worst, biased = {}, {}
    for num_hashes in (1, 4):
        frequency = StreamingFrequency(512, num_hashes=num_hashes, learning_rate=0.1)
        for step in range(1, 401):
            frequency.update(ids[ids % 20 == step % 20])
        p = frequency.log_q(ids).exp()
        assert (p > 0.045).all()  # no gap above the true 20
        worst[num_hashes] = p.max().item()
        biased[num_hashes] = (p > 0.055).double().mean().item()
    assert 0.2 < biased[1] < 0.45
    assert biased[4] < 0.05
    assert worst[4] <= worst[1]


def test_id_never_seen_is_rarer_than_the_stream_is_long() -> None:
    frequency = StreamingFrequency(2**16, num_hashes=2)
    never = torch.tensor([10**12, -1])
    assert (frequency.log_q(never) == 0).all()  # nothing is known before the first batch
    for step in range(9):
        frequency.update(torch.tensor([step]))
    np.testing.assert_allclose(frequency.log_q(never).exp(), [0.1, 0.1], rtol=1e-6)
    patient = StreamingFrequency(2**16, initial_gap=500)
    patient.update(torch.tensor([1]))
    assert math.isclose(patient.log_q(never)[0].exp().item(), 1 / 500, rel_tol=1e-5)


def test_duplicates_in_a_batch_count_once() -> None:
    once, often = StreamingFrequency(64), StreamingFrequency(64)
    for step in range(5):
        once.update(torch.tensor([3, step]))
        often.update(torch.tensor([[3, 3, step], [step, 3, 3]]))
    assert_same_state(once, often)


def test_batch_size_turns_batches_into_draws() -> None:
    # 2,000 batches of 64 independent draws of known Q. The rarest id is in about 240 of them, and
    # a mean of 240 gaps has a relative standard error of 1 / sqrt(240) = 0.065; the others less.
    q = torch.tensor([0.01, 0.004, 0.03, 0.002, 0.954])
    frequency = StreamingFrequency(2**16, learning_rate=0.002, batch_size=64)
    per_batch = StreamingFrequency(2**16, learning_rate=0.002)
    draws = torch.multinomial(q.expand(2000, 5), 64, replacement=True, generator=seeded())
    for batch in draws:
        frequency.update(batch)
        per_batch.update(batch)
    ids = torch.arange(4)
    np.testing.assert_allclose(frequency.log_q(ids), q[:4].log(), atol=4 * 0.065)
    np.testing.assert_allclose(
        per_batch.log_q(ids).double().exp(), 1 - (1 - q[:4].double()) ** 64, rtol=0.3
    )
    exact = 1 - (1 - per_batch.log_q(ids).double().exp()) ** (1 / 64)
    np.testing.assert_allclose(frequency.log_q(ids).double().exp(), exact, rtol=1e-5)
    # Id 4 is in every batch: P is capped, so that Q stays a probability below one.
    cap = 1 - (1 - 1 / 1.002) ** (1 / 64)
    assert math.isclose(frequency.log_q(torch.tensor(4)).exp().item(), cap, rel_tol=1e-5)


# --- count-min sketch -----------------------------------------------------------------------------

int64s = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.one_of(st.integers(-20, 20), int64s), max_size=300),
    st.integers(1, 64),
    st.integers(1, 5),
    int64s,
)
def test_sketch_never_underestimates(ids: list[int], width: int, depth: int, seed: int) -> None:
    sketch = CountMinSketch(width, depth, seed=seed)
    half = len(ids) // 2
    sketch.update(torch.tensor(ids[:half], dtype=torch.int64))
    sketch.update(torch.tensor(ids[half:], dtype=torch.int64).view(1, -1))
    assert sketch.total == len(ids)
    assert (sketch.counts.view(depth, width).sum(1) == len(ids)).all()
    true = Counter(ids)
    distinct = torch.tensor(sorted(true), dtype=torch.int64)
    count = sketch.count(distinct)
    assert (count >= torch.tensor([true[i] for i in distinct.tolist()], dtype=torch.int64)).all()
    assert (count <= len(ids)).all()


def test_sketch_overcounts_no_more_than_promised() -> None:
    # Zipf ids, multiples of 2^32 (a hash by remainder would put them all in one counter).
    ids, _ = LogUniformSampler(50_000).sample(200_000, generator=seeded())
    true = torch.bincount(ids, minlength=50_000)
    sketch = CountMinSketch(width=2048, depth=4)
    sketch.update(ids << 32)
    over = sketch.count(torch.arange(50_000) << 32) - true
    assert (over >= 0).all()
    # Markov's bound allows exp(-4) = 1.8% above e / width of the total.
    assert (over > math.e / 2048 * len(ids)).double().mean() < math.exp(-4)


def test_hash_is_splitmix64() -> None:
    def splitmix64(x: int) -> int:  # in Python's integers, without a sign
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the published first output of seed 0
    ids = [0, 1, -1, 2**31, 2**63 - 1, -(2**63)]
    got = _mix64(torch.tensor(ids)).tolist()
    assert [x % 2**64 for x in got] == [splitmix64(i % 2**64) for i in ids]


@pytest.mark.parametrize("step", [1, 64, 2**20, 2**40, -3])
def test_hash_spreads_structured_ids(step: int) -> None:
    # 1,000 ids for each of 64 counters in a row: chi-square with 63 degrees of freedom in each row.
    sketch = CountMinSketch(width=64, depth=4, seed=1)
    sketch.update(torch.arange(64_000) * step)
    chi_square = ((sketch.counts.view(4, 64) - 1000.0) ** 2 / 1000).sum(1)
    assert ((chi_square - 63).abs() < 5 * math.sqrt(2 * 63)).all()
    # Rows are independent: ids that share a counter in one row are spread over the next.
    row, column = sketch._buckets(torch.arange(64_000) * step)[:2]
    together = torch.bincount(column[row == 0] - 64, minlength=64).double()
    mean = together.mean()
    assert abs(((together - mean) ** 2 / mean).sum() - 63) < 5 * math.sqrt(2 * 63)


def test_sketch_log_q_is_the_share_of_the_stream() -> None:
    sketch = CountMinSketch(width=2**16)
    assert (sketch.log_q(torch.tensor([1, 2])) == 0).all()
    sketch.update(torch.tensor([4] * 6 + [-9] * 2))
    got = sketch.log_q(torch.tensor([[4], [-9], [5]]))
    assert got.shape == (3, 1)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.exp().view(-1), [6 / 8, 2 / 8, 1 / 8], rtol=1e-6)


def test_seed_chooses_the_hash_functions() -> None:
    ids = torch.arange(1000)
    zero, again, one = (CountMinSketch(4096, seed=s)._buckets(ids) for s in (0, 0, 1))
    assert torch.equal(zero, again)
    assert (zero == one).double().mean() < 0.01


# --- both streams ---------------------------------------------------------------------------------


def assert_same_state(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


STREAMS = {
    "frequency": lambda seed: StreamingFrequency(128, num_hashes=2, seed=seed),
    "frequency-draws": lambda seed: StreamingFrequency(128, batch_size=32, seed=seed),
    "sketch": lambda seed: CountMinSketch(128, seed=seed),
}


@pytest.mark.parametrize("name", STREAMS)
def test_stream_state_dict_carries_counts(name: str) -> None:
    stream, restored = STREAMS[name](7), STREAMS[name](7)
    for batch in torch.randint(-(2**62), 2**62, (20, 32), generator=seeded()):
        stream.update(batch)
    restored.load_state_dict(stream.state_dict())
    ids = batch.view(4, 8)
    assert torch.equal(stream.log_q(ids), restored.log_q(ids))
    stream.update(ids)
    restored.update(ids)
    assert_same_state(stream, restored)


@pytest.mark.parametrize("name", STREAMS)
def test_stream_reads_nothing_back_to_the_host(name: str) -> None:
    stream = STREAMS[name](0).to("meta")
    ids = torch.empty(6, 2, dtype=torch.int64, device="meta")
    stream.update(ids)
    assert stream.log_q(ids).shape == (6, 2)


@pytest.mark.parametrize("name", STREAMS)
def test_stream_updates_compile_without_a_graph_break(name: str) -> None:
    eager, compiled = STREAMS[name](0), STREAMS[name](0)
    step = torch.compile(
        lambda ids: (compiled.update(ids), compiled.log_q(ids))[1], backend="eager", fullgraph=True
    )
    for batch in torch.randint(0, 500, (3, 32), generator=seeded()):
        eager.update(batch)
        assert torch.equal(step(batch), eager.log_q(batch))
    assert_same_state(eager, compiled)


@pytest.mark.parametrize("name", STREAMS)
def test_empty_batch_is_a_batch(name: str) -> None:
    stream = STREAMS[name](0)
    stream.update(torch.empty(0, dtype=torch.int64))
    assert stream.log_q(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3)
