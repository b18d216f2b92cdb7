"""The shapes of the speed benchmark: formulas against counting, inputs with what they promise."""

from __future__ import annotations

import pytest
import torch

from benchmarks.speed import shapes
from benchmarks.speed.shapes import CPU, GPU, LEVELS, NUM_ITEMS, TINY, Inputs, Shape, random_inputs

SHARED = Shape("cpu", "shared", 4096, 8192, 64)
PER_EXAMPLE = Shape("per-example", "per-example", 50, 20, 8, table=300)


def test_three_products_are_six_operations_per_row_candidate_and_dimension() -> None:
    assert SHARED.operations == 3 * 2 * 4096 * 8192 * 64


def test_distinct_rows_are_those_that_draws_hit() -> None:
    # Of 1,000 draws from 300 rows about 289 are hit; a draw varies by about 3.
    drawn = random_inputs(PER_EXAMPLE, "plain").negative_ids
    assert drawn is not None
    assert PER_EXAMPLE.distinct == pytest.approx(len(drawn.unique()), abs=12)


def test_gathered_bytes_spelled_out() -> None:
    read, query, written = 50 * 20 * 8, 2 * 50 * 8, PER_EXAMPLE.distinct * 8
    assert PER_EXAMPLE.gathered_bytes == pytest.approx(4 * (read + query + written))


@pytest.mark.parametrize("shape", TINY, ids=str)
def test_gradient_bytes_are_those_of_the_embeddings(shape: Shape) -> None:
    leaves = random_inputs(shape, "plain").leaves().values()
    assert shape.gradient_bytes == sum(leaf.numel() * leaf.itemsize for leaf in leaves)


def test_only_versions_that_keep_the_logits_need_their_memory() -> None:
    assert SHARED.needed_bytes("eager") == 4 * 4096 * 8192 * 4
    assert SHARED.needed_bytes("chunked") == 0
    assert PER_EXAMPLE.needed_bytes("torch.compile") == 2 * 50 * 20 * 8 * 4


def test_shrunk_shape_is_named_a_twin_and_stays_square_in_a_batch() -> None:
    small = Shape("two-tower", "in-batch", 8192, 8192, 128).shrunk(1000, 500, 0)
    assert (small.rows, small.candidates, small.twin) == (500, 500, True)
    assert "(twin)" in str(small)
    assert SHARED.shrunk(1 << 20, 1 << 20, 0) is SHARED


def test_shapes_of_a_cpu_have_a_counterpart_and_are_named_twins_where_smaller() -> None:
    for own in CPU[4:]:  # the first are its own
        (shape,) = (s for s in GPU if s.name == own.name)
        smaller = (own.rows, own.candidates, own.dim) != (shape.rows, shape.candidates, shape.dim)
        assert own.kind == shape.kind
        assert own.twin == smaller
    assert {s.name for s in GPU} - {s.name for s in CPU} == {"odd", "unscaled"}


def test_unscaled_logits_are_products_of_standard_normals() -> None:
    """At D = 128 their standard deviation is 11, and candidates outscore a positive by far."""
    (shape,) = (s for s in GPU if s.name == "unscaled")
    assert (shape.temperature, shape.compared_at) == (1.0, "plain")
    inputs = random_inputs(shape.shrunk(400, 400, 0), shape.compared_at)
    assert inputs.positive is not None
    logits = (inputs.query.float() @ inputs.positive.float().T).detach()
    assert float((logits - logits.diag()[:, None]).max()) > 44


@pytest.mark.parametrize("shape", [*CPU, *GPU], ids=str)
def test_shape_survives_json(shape: Shape) -> None:
    assert Shape.from_dict(shape.as_dict()) == shape


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("side", shapes.SIDES)
def test_growth_moves_one_side_to_65_536_and_beyond(side: shapes.Side, device: str) -> None:
    points = shapes.growth(side, device)
    sizes = [getattr(shape, side) for shape in points]
    assert sizes == sorted(sizes)
    assert sizes[-1] >= 65_536
    other = "rows" if side == "candidates" else "candidates"
    assert len({getattr(shape, other) for shape in points}) == 1


@pytest.mark.parametrize("shape", [s for s in shapes.scales(SHARED) if not s.rising], ids=str)
def test_logits_have_the_standard_deviation_that_the_shape_names(shape: Shape) -> None:
    inputs = random_inputs(shape.shrunk(100, 2000, 0), "plain")
    assert inputs.negative is not None
    logits = inputs.query @ inputs.negative.T / inputs.temperature
    assert float(logits.detach().std()) == pytest.approx(shape.spread, rel=0.05)


def test_rising_logits_lead_in_every_tile_of_every_row() -> None:
    (shape,) = (s for s in shapes.scales(SHARED) if s.rising)
    inputs = random_inputs(shape.shrunk(100, 2048, 0), "plain")
    assert inputs.negative is not None
    logits = inputs.query @ inputs.negative.T / inputs.temperature
    tops = logits.unflatten(1, (16, 128)).amax(2)
    assert bool((tops.diff(dim=1) > 100).all())


def test_hits_occur_in_the_inputs() -> None:
    for shape in (TINY[0], TINY[3]):
        inputs = random_inputs(shape, "domain weights")
        assert inputs.positive_ids is not None
        assert inputs.negative_ids is not None
        hits = inputs.positive_ids[:, None] == inputs.negative_ids
        assert 0 < hits.sum() < hits.numel() / 10


def test_log_q_is_the_probability_that_the_ids_are_drawn_with() -> None:
    # 40,000 draws: the share of the smallest ids is known to a percent.
    inputs = random_inputs(Shape("many", "shared", 1, 40_000, 1), "hits")
    assert inputs.negative_ids is not None
    assert inputs.negative_log_q is not None
    assert inputs.negative_ids.max() < NUM_ITEMS
    for item in (1, 2, 3):
        drawn = inputs.negative_ids == item
        probability = inputs.negative_log_q[drawn][0].exp()
        assert drawn.double().mean() == pytest.approx(float(probability), rel=0.1)


@pytest.mark.parametrize("shape", TINY, ids=str)
def test_levels_of_a_shape_are_in_order_and_end_with_everything(shape: Shape) -> None:
    assert [level for level in LEVELS if level in shape.levels] == list(shape.levels)
    assert (shape.levels[0], shape.levels[-1]) == ("plain", "domain weights")


def test_every_second_row_of_a_padded_batch_weighs_nothing() -> None:
    weights = random_inputs(TINY[0], "plain").half_padded().example_weights
    assert weights is not None
    assert weights.tolist() == [float(row % 2) for row in range(37)]


def test_inputs_in_another_dtype_are_leaves_of_their_own() -> None:
    inputs = random_inputs(TINY[0], "plain")
    double: Inputs = inputs.to(torch.float64)
    assert all(leaf.is_leaf and leaf.dtype == torch.float64 for leaf in double.leaves().values())
    torch.testing.assert_close(double.query.float(), inputs.query)
