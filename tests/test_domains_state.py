"""What domain weights keep, where they live, and how they print."""

import copy

import pytest
import torch
from cases import each_once

from dwl_kernels.domains import DomainWeights


def test_constant_weights_count_and_never_change():
    weights = DomainWeights.constant(torch.tensor([3.0, 0.0]))
    weights.update(torch.tensor([0, 0, 0, 1]))
    assert weights().tolist() == [3, 0]
    assert weights.interactions.tolist() == [3, 1]


def test_weights_given_out_are_not_changed_by_later_updates():
    weights = DomainWeights(2, momentum=0.0)
    given_out = weights()
    weights.update(torch.tensor([0, 0, 0, 1]))
    assert given_out.tolist() == [1, 1]
    assert weights()[1] > weights()[0]


def test_state_dict_carries_on_where_it_was_saved():
    source = DomainWeights.from_interactions(
        [0, 0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 0, 0, 1, 2], num_domains=4
    )
    source.update(torch.tensor([0, 1, 3]))
    loaded = DomainWeights(4)
    loaded.load_state_dict(copy.deepcopy(source.state_dict()))
    for name, buffer in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], buffer), name
    assert torch.equal(loaded(), source())
    for weights in (source, loaded):
        weights.update(torch.tensor([3, 3, 2]))
    assert torch.equal(source(), loaded())
    with pytest.raises(RuntimeError, match="size mismatch"):
        DomainWeights(5).load_state_dict(source.state_dict())


@pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.double])
def test_casting_a_model_leaves_the_state_as_it_is(cast):
    weights = DomainWeights(3)
    weights.update(torch.tensor([0, 0, 0, 1, 1, 2]))
    before = {name: buffer.clone() for name, buffer in weights.state_dict().items()}
    cast(torch.nn.Sequential(torch.nn.Linear(2, 2), weights))
    for name, buffer in weights.state_dict().items():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name]), name


def test_built_on_the_meta_device_and_moved():
    with torch.device("meta"):
        weights = DomainWeights(3)
    assert weights.to_empty(device="cpu").weights.device.type == "cpu"


def test_updates_repeat_to_the_bit():
    ids = each_once(torch.randint(-1, 6, (2000, 3), generator=torch.Generator().manual_seed(0)))
    first, second = DomainWeights(6), DomainWeights(6)
    for weights in (first, second):
        for part in ids.split(500):
            weights.update(part)
    assert torch.equal(first(), second())


def test_no_value_is_read_off_the_device():
    # Tensors on `meta` have no values: whatever would wait for a device to read one raises here.
    weights = DomainWeights(3).to("meta")
    ids = torch.zeros(5, 2, dtype=torch.int64, device="meta")
    weights.update(ids)
    assert weights.log_weight(ids).shape == (5,)
    assert weights().shape == (3,)


def test_compiled_update_equals_eager():
    eager, compiled = DomainWeights(4), DomainWeights(4)
    step = torch.compile(compiled.update, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        ids = torch.randint(-1, 4, (16, 2), generator=torch.Generator().manual_seed(seed))
        ids = each_once(ids)
        eager.update(ids)
        step(ids)
    assert torch.equal(eager.interactions, compiled.interactions)
    torch.testing.assert_close(eager(), compiled())


def test_printed_table_names_and_numbers_the_domains():
    weights = DomainWeights.from_interactions(
        users=[1, 1, 2, 3], items=[10, 11, 10, 12], domains=[1, 1, 1, 0], names=["noir", "drama"]
    )
    lines = str(weights).splitlines()
    assert lines[0] == (
        "DomainWeights(2, measures=(1.0, 1.0, 1.0), weight_range=(1.0, 4.0), momentum=0.99)"
    )
    header = ["domain", "interactions", "share", "users", "entropy", "sparsity", "weight"]
    assert lines[1].split() == header
    sparsity, weight = weights.sparsity()[1], weights()[1]
    drama = ["drama", "3", "75.00%", "2", "0.64", f"{sparsity:.3f}", f"{weight:.3f}"]
    assert lines[3].split() == drama
    assert lines[4].split()[:5] == ["noir", "1", "25.00%", "1", "0.00"]
    assert len({len(line) for line in lines[1:]}) == 1  # aligned
    assert "drama" not in repr(torch.nn.Sequential(weights))


def test_printed_table_says_what_is_not_measured_and_leaves_out_the_middle():
    streamed = DomainWeights(2)
    streamed.update(torch.tensor([0, 0, 1]))
    assert str(streamed).splitlines()[3].split()[3:5] == ["-", "-"]
    long = str(DomainWeights(1000)).splitlines()
    assert len(long) == 3 + 41
    assert long[23].split() == ["..."] * 7
