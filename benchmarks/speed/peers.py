"""Published packages with a loss of the same kind, where they are installed (`.[bench]`).

They run on GPUs only, and none of them is ever needed. Each comes with its defaults; some also with
their most accurate settings. What follows a comma in a name is the setting.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.shapes import Inputs, Kind, Shape

Loss = Callable[[Inputs], Tensor]
SIGMOID_BIAS = -10.0  # as the package's own example has it


class Peer(NamedTuple):
    module: str
    make: Callable[[Any], Loss]  # of the imported module
    kind: Kind = "full"
    limit: str = ""  # what it asks of a shape, and whether a shape has it:
    takes: Callable[[Shape], bool] = lambda shape: True


def losses(shape: Shape, device: str) -> tuple[dict[str, Loss], dict[str, str]]:
    """The peers of a shape, and why others are left out."""
    found: dict[str, Loss] = {}
    left_out: dict[str, str] = {}
    for name, peer in PEERS.items():
        if peer.kind != shape.kind or shape.compared_at != "plain":
            continue
        if not peer.takes(shape):
            left_out[name] = f"it takes {peer.limit}"
            continue
        try:
            found[name] = peer.make(importlib.import_module(peer.module))
        except Exception as error:  # not installed, or not made for this PyTorch or Triton
            left_out[name] = f"{peer.module} cannot be imported ({type(error).__name__}: {error})"
            continue
        if device != "cuda":
            del found[name]
            left_out[name] = "it needs a CUDA device"
    return found, left_out


def _liger(module: Any, **options: Any) -> Loss:
    loss = module.LigerFusedLinearCrossEntropyLoss(**options)
    return lambda x: loss(x.table, x.query / x.temperature, x.positive_ids)


def _liger_hopper(module: Any) -> Loss:
    apply = module.LigerFusedLinearCrossEntropySM90Function.apply
    return lambda x: apply(x.query / x.temperature, x.table, x.positive_ids)


def _quack(module: Any, **options: Any) -> Loss:
    function = functools.partial(module.chunked_linear_cross_entropy, **options)
    return lambda x: function(x.query / x.temperature, x.table, x.positive_ids)


def _cut(module: Any, **options: Any) -> Loss:
    function = functools.partial(module.linear_cross_entropy, **options)
    return lambda x: function(x.query / x.temperature, x.table, x.positive_ids)


def _memeff(module: Any) -> Loss:
    """A softmax over the batch; no margin, embeddings as they are, gradients of their true size."""
    options = {"margin": 1e30, "normalized_inputs": True, "stable": False}
    make = functools.cache(
        lambda temperature: module.MemoryEfficientQwen3Loss(temperature, **options)
    )
    return lambda x: make(x.temperature)(x.query, x.positive)


def _siglip(module: Any) -> Loss:
    @functools.cache
    def numbers(temperature: float, device: torch.device) -> tuple[Tensor, Tensor]:
        values = (-math.log(temperature), SIGMOID_BIAS)
        first, second = (torch.tensor(value, device=device) for value in values)
        return first, second

    def loss(x: Inputs) -> Tensor:
        own = numbers(x.temperature, x.query.device)
        value: Tensor = module.fused_siglip_loss(x.query, x.positive, *own, backend="chunked_bf16")
        return value

    return loss


def sigmoid_loss(x: Inputs) -> Tensor:
    """What `siglip-kernel` computes: another loss of as many products."""
    assert x.positive is not None
    z = x.query @ x.positive.T / x.temperature + SIGMOID_BIAS
    return F.softplus(torch.where(torch.eye(len(z), device=z.device) > 0, -z, z)).sum() / len(z)


FORMULAS: dict[str, Loss] = {"siglip-kernel": sigmoid_loss}  # of what is no softmax

_HOPPER = "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90"
_LIGER, _QUACK, _CUT = (
    "liger_kernel.transformers",
    "quack.linear_cross_entropy",
    "cut_cross_entropy",
)
_EIGHTS = "rows, items and dimensions that 8 divides"


def _tiled(shape: Shape) -> bool:
    tiles = shape.rows % 128 == shape.candidates % 256 == 0
    return tiles and shape.dtype == torch.bfloat16


def _eights(shape: Shape) -> bool:
    return shape.rows % 8 == shape.candidates % 8 == shape.dim % 8 == 0


PEERS: dict[str, Peer] = {
    "liger-kernel": Peer(_LIGER, _liger),
    "liger-kernel, float32 sums": Peer(
        _LIGER, functools.partial(_liger, accum_dtype=torch.float32)
    ),
    "liger-kernel, Hopper": Peer(
        _HOPPER,
        _liger_hopper,
        limit="bfloat16, rows that 128 and items that 256 divides",
        takes=_tiled,
    ),
    "quack-kernels": Peer(_QUACK, _quack, limit=_EIGHTS, takes=_eights),
    "quack-kernels, logits kept": Peer(
        _QUACK, functools.partial(_quack, use_scaled_exp=False), limit=_EIGHTS, takes=_eights
    ),
    "cut-cross-entropy": Peer(_CUT, _cut),
    "cut-cross-entropy, no filter": Peer(_CUT, functools.partial(_cut, filter_eps=None)),
    "memeff": Peer(
        "memeff",
        _memeff,
        "in-batch",
        limit="16, 32 and from 64 dimensions on",
        takes=lambda shape: shape.dim in (16, 32) or shape.dim >= 64,
    ),
    "siglip-kernel": Peer(
        "siglip_kernel",
        _siglip,
        "in-batch",
        limit="types of 16 bits",
        takes=lambda shape: shape.dtype.itemsize == 2,
    ),
}
