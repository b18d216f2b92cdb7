"""From a call of a module of sampled softmax to its problem: embeddings, or rows of a table."""

from __future__ import annotations

import math
from typing import Any, cast

from torch import Tensor

from dwl_kernels.core.arguments import check_dense
from dwl_kernels.core.build import (
    check_of_batch,
    in_batch_problem,
    sampled_problem,
    takes_batch,
)
from dwl_kernels.core.checks import Calibrated, both_or_none, padded_by_id
from dwl_kernels.core.drawn import (
    checked_table_ids,
    item_ids,
    left_out,
    per_row_problem,
    table_rows,
)
from dwl_kernels.core.problem import NO_ITEM, Correction, DualScale, Problem
from dwl_kernels.modules.calls import Call, Given, rows_of_table
from dwl_kernels.modules.checks import check_candidates, check_tensors, checked_ids, padding
from dwl_kernels.modules.normalize import normalised
from dwl_kernels.modules.weighted import WeightedLoss


class CandidateLoss(WeightedLoss):
    """A loss whose rows compete with candidates. The modules say what the options mean."""

    correction: Correction
    remove_accidental_hits: bool
    ignore_index: int | None
    in_batch: bool | None
    sparse_grad: bool
    _takes_negatives_per_row = True
    _dual: DualScale | None = None

    def _checked(self, embeddings: tuple[Any, ...], given: Given) -> Call:
        """What the arguments of `forward` ask for."""
        query, positive, negative, table = embeddings
        example_weights = given.example_weights
        check_dense("query", query)
        check_tensors(
            positive=positive,
            negative=negative,
            table=table,
            positive_log_q=given.positive_log_q,
            negative_log_q=given.negative_log_q,
            example_weights=example_weights,
        )
        names = (
            *("positive_ids", "negative_ids", "query_ids"),
            *("domain_ids", "negative_domain_ids"),
        )
        ids = checked_ids(query, **{name: getattr(given, name) for name in names})
        given = given._replace(**dict(zip(names, ids, strict=True)))
        positive_ids, negative_ids = given.positive_ids, given.negative_ids
        ignore = self.ignore_index
        example_weights = padded_by_id("positive_ids", positive_ids, query, ignore, example_weights)
        if table is not None and negative_ids is not None and ignore is not None:
            negative_ids = negative_ids.masked_fill(negative_ids.long() == ignore, NO_ITEM)
        given = given._replace(example_weights=example_weights, negative_ids=negative_ids)
        log_q = given.positive_log_q, given.negative_log_q
        check_candidates(positive, negative, table, positive_ids, negative_ids, log_q[1])
        items = positive_ids
        if table is None and given.table_ids is not None:
            raise ValueError(
                "table_ids are the items of the rows of a table, which is not given; pass table, "
                "or the ids of items as positive_ids and negative_ids"
            )
        if given.table_ids is not None:
            given = given._replace(table_ids=checked_table_ids(given.table_ids, table, query))
            items = self._items(positive_ids, given.table_ids)
        elif table is not None:
            self._check_items(table)
        padded = padding(example_weights, query.shape[:-1])
        negatives = None  # [N] or [B, K]
        if negative is not None:
            negatives = negative.shape[: max(negative.dim() - 1, 1)]
        if table is not None and negative_ids is not None:
            negatives = negative_ids.shape
        in_batch = takes_batch(self.in_batch, negatives is not None)
        per_row = negatives is not None and len(negatives) != 1
        if not in_batch:
            check_of_batch(given.query_ids)
        if per_row:
            self._check_per_row("negative" if table is None else "negative_ids")
        if negatives is not None:  # before calibration, which makes both
            both_or_none("positive_log_q", log_q[0], "negative_log_q", log_q[1])
        own = ("domain_ids", given.domain_ids), ("positive_ids", items)
        domains = self._domains_of_rows(*own, query, padded)
        return Call(given._replace(domain_ids=domains), padded, negatives, in_batch, per_row)

    def _items(self, ids: Tensor | None, table_ids: Tensor | None) -> Tensor | None:
        """The items of ids, -1 for those of padding."""
        if ids is None or (self.ignore_index is None and table_ids is None):
            return ids
        items = item_ids(ids.long(), table_ids)
        if self.ignore_index is None:
            return items
        return items.masked_fill(ids.long() == self.ignore_index, NO_ITEM)

    def _problem(
        self,
        embeddings: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
        call: Call,
        weights: Tensor | None,  # [num_domains]
    ) -> Problem:
        """The problem of the rows that were given."""
        query, positive, negative, table = embeddings
        given, padded = call.given, call.padded
        draws: dict[str, Any] = {
            "positive_ids": given.positive_ids,
            "negative_ids": given.negative_ids,
            "positive_log_q": given.positive_log_q,
            "negative_log_q": given.negative_log_q,
        }
        if given.domain_ids is not None and weights is not None and self.calibration:
            tilt = self._tilt(given.domain_ids, weights)
            if not call.in_batch:
                # A row of weight 0 is nobody's candidate, and needs no correction.
                tilt = tilt.masked_fill(tilt == -math.inf, 0.0)
            draws["positive_log_q"] = Calibrated(given.positive_log_q, tilt)
            if call.negatives is not None:
                candidate_domains = self._domains_of(
                    ("negative_domain_ids", given.negative_domain_ids),
                    ("negative_ids", self._items(given.negative_ids, given.table_ids)),
                    call.negatives,
                    padded[..., None] if call.per_row and padded is not None else None,
                )
                tilt = self._tilt(candidate_domains, weights)
                draws["negative_log_q"] = Calibrated(given.negative_log_q, tilt)
        rows: dict[str, Any] = {
            "domain_ids": given.domain_ids,
            "domain_weights": weights,
            "example_weights": given.example_weights,
            "temperature": self.temperature,
            "correction": self.correction,
            "reduction": self.reduction,
        }
        hits = self.remove_accidental_hits
        if table is not None and call.per_row:
            if self.normalize:
                query, table = normalised(query, padded), normalised(table, drawn=True)
            ids = draws.pop("positive_ids"), draws.pop("negative_ids")
            drawn = table_rows(query, table, *ids, given.example_weights)
            negative_rows = left_out(*drawn, given.table_ids, hits)
            return per_row_problem(query, table, drawn[0], negative_rows, **draws, **rows)
        if table is not None:
            options = self.sparse_grad, self.backend
            of_table = given.example_weights, given.table_ids, draws
            positive, negative = rows_of_table(query, table, *of_table, *options)
        assert positive is not None  # `check_candidates` has looked
        if self.normalize:
            query, positive = normalised(query, padded), normalised(positive, padded)
            of_rows = None
            if negative is not None and call.per_row and padded is not None:
                of_rows = padded[..., None].expand(negative.shape[:-1])
            negative = None if negative is None else normalised(negative, of_rows, drawn=True)
        one_side = (given.positive_ids is None) != (given.negative_ids is None)
        if hits and negative is not None and one_side:
            raise ValueError(
                "hits are found by the ids of both sides, and one of positive_ids and negative_ids "
                "is missing; pass both, or remove_accidental_hits=False to the module"
            )
        draws |= {"remove_accidental_hits": hits, "ignore_index": None, "dual": self._dual}
        if table is None:  # of which they have been taken out
            draws["ignore_index"] = self.ignore_index
        if not call.in_batch:
            return sampled_problem(query, positive, cast("Tensor", negative), **draws, **rows)
        log_q, ids = draws.pop("positive_log_q"), draws.pop("positive_ids")
        draws |= {"log_q": log_q, "ids": ids, "query_ids": given.query_ids}
        draws |= {"negative": negative, "prefix": "positive_"}
        return in_batch_problem(query, positive, **draws, **rows)

    def _check_per_row(self, name: str) -> None:
        """ValueError where an option does not go with negatives of every row's own."""
        for conflict, reason in (
            (
                not self._takes_negatives_per_row,
                f"{type(self).__name__} takes negatives that all rows share: pass [N]",
            ),
            (
                self.in_batch,
                "in_batch=True goes with negatives that all rows share: pass [N], or leave "
                "in_batch out",
            ),
            (
                name == "negative_ids" and self.normalize and self.sparse_grad,
                "normalize makes the gradient of their table dense: pass [N], or sparse_grad=False",
            ),
        ):
            if conflict:
                raise ValueError(f"{name} names negatives per row, but {reason}")
