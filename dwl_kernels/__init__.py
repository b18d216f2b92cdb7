"""Fused training losses for retrieval and sequential recommendation."""

from dwl_kernels.functional import in_batch_softmax_loss, sampled_softmax_loss

__version__ = "0.1.0"

__all__ = ["in_batch_softmax_loss", "sampled_softmax_loss"]
