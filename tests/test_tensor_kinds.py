"""Distributed, quantised and subclassed tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from good_arguments import B, D, N, good, ids

import dwl_kernels
from dwl_kernels import (
    sampled_softmax_loss,
)


def placed(*placements: str | int) -> Any:
    """What a DTensor says of itself: each mesh dimension shards this one, replicates or sums."""

    class Placement:
        def __init__(self, way: str | int) -> None:
            self.way = self.dim = way

        def is_replicate(self) -> bool:
            return self.way == "replicate"

        def is_shard(self) -> bool:
            return isinstance(self.way, int)

    class DTensor(torch.Tensor):
        pass

    def of(value: torch.Tensor) -> torch.Tensor:
        tensor = value.as_subclass(DTensor)
        tensor.placements = [Placement(way) for way in placements]
        tensor.device_mesh = torch.empty((1,) * len(placements))
        return tensor

    return of


PARTIAL = r'full_tensor\(grad_placements=\[Partial\("avg"\)\]'


@pytest.mark.parametrize(
    ("change", "mend"),
    [
        ({"query": placed(0)(torch.ones(B, D))}, r"query\.to_local\(\)$"),
        ({"query": placed("replicate")(torch.ones(B, D))}, r"query\.to_local\(\)$"),
        ({"query": placed(1)(torch.ones(B, D))}, r"all of it, query\.full_tensor\(\)$"),
        ({"positive": placed("sum")(torch.ones(B, D))}, r"positive\.full_tensor\(\)$"),
        ({"negative": placed(0)(torch.ones(N, D))}, rf"all of it, negative\.{PARTIAL}\)"),
        ({"negative": placed("replicate", 0)(torch.ones(N, D))}, rf"negative\.{PARTIAL} \* 2\)"),
        ({"temperature": placed(0)(torch.ones(1))}, rf"temperature\.{PARTIAL}\)"),
        ({"temperature": placed(0)(torch.ones(B))}, r"temperature\.to_local\(\)$"),
        (
            {"positive_ids": placed(0)(ids(B)), "negative_ids": ids(N)},
            r"positive_ids\.to_local\(\)$",
        ),
        (
            {"positive_ids": ids(B), "negative_ids": placed(0)(ids(N))},
            r"all of it, negative_ids\.full_tensor\(\)$",
        ),
        ({"example_weights": placed(0)(torch.ones(B))}, r"example_weights\.to_local\(\)$"),
    ],
    ids=lambda x: str(x)[-40:],
)
def test_dtensor_is_refused_with_the_mend_that_is_right_for_it(change: dict, mend: str) -> None:
    with pytest.raises(TypeError, match=rf"is a DTensor; pass .*{mend}"):
        sampled_softmax_loss(**good(**change))
    loss_fn = dwl_kernels.DynamicWeightedSampledSoftmax()
    if "temperature" not in change:
        with pytest.raises(TypeError, match=rf"is a DTensor; pass .*{mend}"):
            loss_fn(**good(**change))


def test_subclass_of_a_tensor_passes() -> None:
    class Named(torch.Tensor):
        pass

    inputs = good()
    got = sampled_softmax_loss(**{k: v.as_subclass(Named) for k, v in inputs.items()})
    assert torch.equal(got.as_subclass(torch.Tensor), sampled_softmax_loss(**inputs))


@pytest.mark.filterwarnings("ignore")
def test_quantised_tensor_is_refused_with_the_mend() -> None:
    quantised = torch.quantize_per_tensor(torch.ones(N, D), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"negative is quantised; call \.dequantize\(\)"):
        sampled_softmax_loss(**good(negative=quantised))
