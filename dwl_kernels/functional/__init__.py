"""The losses as functions, and what they know of their rows.

``query`` and ``positive`` are ``[B, D]``, or carry leading dimensions ``[..., D]``; arguments per
row then carry the same leading dimensions, and ``reduction="none"`` returns them.

The contract of every loss:

=================  ==========================================================================
dtypes in          float32, float64, bfloat16 or float16, the same for all embeddings; ids,
                   targets and domains of integers; log-Q and weights of floats
dtypes out         the loss float32, float64 of float64; a gradient that of its input
rounding           16-bit embeddings are multiplied exactly and summed in float32; logits,
                   exponentials and sums are float32 (float64 of float64). ``triton``, ``cuda``
                   and ``cpu`` (bfloat16 of even D, where the processor multiplies it) round
                   probabilities to the 16-bit dtype before the second product; gradients are
                   rounded once, at the end. float32 products follow
                   ``torch.get_float32_matmul_precision()`` on a GPU; on a CPU ``"medium"`` rounds
                   the embeddings of shared candidates to bfloat16 once
error              at most twice that of the plain computation in the same dtype, plus 1e-6
                   (float32), 1e-3 (float16) or 4e-3 (bfloat16) of the largest entry
repeats            bitwise the same on the same device with as many threads (``eager`` and
                   ``chunked`` as far as PyTorch's own operations are)
memory             beyond inputs and gradients: ``eager`` several times ``B N``; ``chunked`` 2^21
                   logits (2^26 on a GPU) and their copies; ``cpu`` at most ``128 N`` numbers, and
                   with products of bfloat16 a copy of the candidates (of float32 two); ``triton``
                   and ``cuda`` ``11 B`` and, for each of some hundred programs,
                   ``256 (D + 3)``; ``triton`` with D above 256 2^23 logits, or those of 512 rows,
                   at most 2^27, and ``N D`` numbers. Per row none holds ``[B, K, D]`` but what is
                   given and its gradient; both take a list of the ``B K`` places. ``cpu``
                   keeps the memory of one gradient of a table, 16 to 256 MB, from step to step
does not take      ``triton``: float64, a hardness below -0.2 up to D = 256, and
                   with D above 256 candidates per row; ``cuda``: the dual scale, candidates per
                   row, D above 256, ids of items and of queries at once; ``auto`` then takes
                   ``chunked``
ranks              ``rank_targets`` and ``softmax_statistics``: of exact scores, in ``chunked`` and
                   ``cpu`` (per row and in ``triton`` of rounded ones, where equal embeddings tie);
                   ``triton`` and ``cuda`` make statistics, ``cuda`` ranks too, as ``chunked``
                   does; ``[B]`` and a block in memory, and in ``triton`` a list of what was seen
derivatives        reverse mode, once; forward mode and second derivatives raise, and over a
                   ``process_group`` the transforms of ``torch.func``
=================  ==========================================================================
"""

from dwl_kernels.functional.dual_scale import dual_scale_softmax_loss
from dwl_kernels.functional.ranking import rank_targets, softmax_statistics
from dwl_kernels.functional.sampled import in_batch_softmax_loss, sampled_softmax_loss
from dwl_kernels.functional.table import full_softmax_loss, indexed_sampled_softmax_loss

__all__ = [
    "dual_scale_softmax_loss",
    "full_softmax_loss",
    "in_batch_softmax_loss",
    "indexed_sampled_softmax_loss",
    "rank_targets",
    "sampled_softmax_loss",
    "softmax_statistics",
]
