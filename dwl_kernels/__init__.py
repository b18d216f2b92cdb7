"""Fused training losses for retrieval and sequential recommendation.

Start at :class:`DynamicWeightedSampledSoftmax`, or at the functions it calls.
"""

from dwl_kernels import _interrupt as _interrupt  # first, before torch
from dwl_kernels.core.problem import SoftmaxStatistics
from dwl_kernels.dial import choose_bonus, ranks_with_bonus
from dwl_kernels.domains import DomainWeights, domains_from_multi_hot
from dwl_kernels.frequency import CountMinSketch, StreamingFrequency
from dwl_kernels.functional import (
    dual_scale_softmax_loss,
    full_softmax_loss,
    in_batch_softmax_loss,
    indexed_sampled_softmax_loss,
    rank_targets,
    sampled_softmax_loss,
    softmax_statistics,
)
from dwl_kernels.metrics import accuracy_at, mrr, ndcg_at
from dwl_kernels.modules import (
    CumulativeCrossEntropy,
    DualScaleSampledSoftmax,
    DynamicWeightedSampledSoftmax,
)
from dwl_kernels.samplers import LogUniformSampler, UniformSampler, UnigramSampler

__version__ = "0.1.0"

__all__ = [
    "CountMinSketch",
    "CumulativeCrossEntropy",
    "DomainWeights",
    "DualScaleSampledSoftmax",
    "DynamicWeightedSampledSoftmax",
    "LogUniformSampler",
    "SoftmaxStatistics",
    "StreamingFrequency",
    "UniformSampler",
    "UnigramSampler",
    "accuracy_at",
    "choose_bonus",
    "domains_from_multi_hot",
    "dual_scale_softmax_loss",
    "full_softmax_loss",
    "in_batch_softmax_loss",
    "indexed_sampled_softmax_loss",
    "mrr",
    "ndcg_at",
    "rank_targets",
    "ranks_with_bonus",
    "sampled_softmax_loss",
    "softmax_statistics",
]
