"""The losses as modules: what a training loop swaps its loss for."""

from dwl_kernels.modules.cumulative import CumulativeCrossEntropy
from dwl_kernels.modules.dual_scale import DualScaleSampledSoftmax
from dwl_kernels.modules.sampled import DynamicWeightedSampledSoftmax

__all__ = [
    "CumulativeCrossEntropy",
    "DualScaleSampledSoftmax",
    "DynamicWeightedSampledSoftmax",
]
