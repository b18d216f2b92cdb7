"""The dual scale in the wide form: what `wide` adds to a block of logits before its pass."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dwl_kernels.core.candidates import dual_scale
from dwl_kernels.core.problem import DualScale, SharedProblem
from dwl_kernels.core.rows import Prepared, embeddings


class Pulled(NamedTuple):
    """The dual scale, ``tau_i log kappa_ij = own_i <q_i, c_j> + other_i <pull_i, c_j> + level_i``.

    And ``tau_i`` is ``factor_i`` times the temperature of the row. The pull is ``h q_i + s p_i``,
    from which the level follows, so that its rounding cancels. 16-bit products would round it more,
    so there it is ``p_i``.
    """

    pull: Tensor  # [B, D]
    own: Tensor | None  # [B, 1]
    other: Tensor  # [B, 1]
    level: Tensor  # [B, 1]
    factor: Tensor  # [B]

    def add_to(self, logits: Tensor, products: Tensor, rows: slice) -> None:
        """Add ``tau_i log kappa_ij``, summed first: its large terms cancel each other."""
        products *= self.other[rows]
        if self.own is not None:
            products.addcmul_(logits, self.own[rows])
        logits += products.add_(self.level[rows])


def pulled(problem: SharedProblem, dual: DualScale, prepared: Prepared) -> tuple[Pulled, Prepared]:
    """What the dual scale makes of the rows, and what is known of them with their temperatures."""
    query, positive, candidates = embeddings(problem, prepared.active)
    scaled = dual_scale(problem, dual, prepared, query, positive, candidates)
    factor = scaled.tau / prepared.tau
    own, other = None, factor[:, None]
    pull = dual.hardness * query + dual.similarity * positive
    if problem.query.dtype != pull.dtype:
        pull, own, other = (
            positive.to(problem.query.dtype),
            dual.hardness * other,
            dual.similarity * other,
        )
    found = Pulled(pull, own, other, (scaled.shift * scaled.tau)[:, None], factor)
    return found, prepared._replace(tau=scaled.tau.contiguous())
