"""The cases that every backend must pass.

A case is a small problem with one thing that is easy to get wrong. The sizes are no multiple of any
tile: 1, 3, 17, 127 and 129 rows or candidates, 1, 20 and 96 dimensions.
"""

from __future__ import annotations

from typing import Any

import case_changes
import torch
from case import (
    DIFFERENTIABLE,
    MARGIN,
    NOT_IN_CUDA,
    TABLE_ROWS,
    Case,
    Formula,
    Inputs,
    check,
    each_once,
    error,
    loss_and_gradients,
)

__all__ = [
    "CASES",
    "DIFFERENTIABLE",
    "MARGIN",
    "NOT_IN_CUDA",
    "TABLE_ROWS",
    "Case",
    "Formula",
    "Inputs",
    "check",
    "each_once",
    "error",
    "loss_and_gradients",
]

_FULL: dict[str, Any] = {"log_q": True, "ids": True, "domains": 2, "examples": True}
_FULL_ROWS: dict[str, Any] = {**_FULL, "temperature": "rows"}

CASES = [
    Case("one of everything", rows=1, candidates=1, dim=1),
    Case("three rows", rows=3, candidates=1, dim=20),
    Case("past the tile", rows=129, candidates=127, dim=20, **_FULL_ROWS),
    Case("short of the tile", rows=127, candidates=129, dim=96, **_FULL_ROWS),
    Case("many candidates", rows=3, candidates=1025, dim=20, **_FULL),
    Case("many rows", rows=515, candidates=3, dim=1, **_FULL),
    Case("plain"),
    Case("log-Q", log_q=True),
    Case("log-Q and hits", log_q=True, ids=True),
    Case("domains", domains=1),
    Case("several domains, some missing", domains=3),
    Case("several domains, none missing", domains=3, change=case_changes.all_domains),
    Case("no domain at all", domains=2, change=case_changes.no_domain),
    Case("example weights", examples=True),
    Case("scalar temperature", temperature="scalar"),
    Case("temperature per row", temperature="rows"),
    Case("everything", **_FULL_ROWS),
    *(
        Case(f"everything, {r}", **_FULL_ROWS, options={"reduction": r})
        for r in ("weighted_mean", "sum", "none")
    ),
    Case("refined", options={"correction": "refined"}),
    Case("refined, everything", **_FULL_ROWS, options={"correction": "refined"}),
    Case(
        "refined, none",
        **_FULL_ROWS,
        options={"correction": "refined", "reduction": "none"},
    ),
    Case(
        "refined, negatives taken out",
        log_q=True,
        change=case_changes.remove,
        options={"correction": "refined"},
    ),
    Case(
        "refined, negatives taken out, some are hits",
        **_FULL_ROWS,
        change=case_changes.remove,
        options={"correction": "refined"},
    ),
    Case("no candidates", candidates=0, **_FULL),
    Case("refined, no candidates", candidates=0, **_FULL, options={"correction": "refined"}),
    Case("no rows", rows=0, **_FULL),
    Case("no rows, none", rows=0, **_FULL, options={"reduction": "none"}),
    Case("duplicates", **_FULL, change=case_changes.duplicates),
    Case("every candidate a hit", **_FULL, change=case_changes.all_hits),
    Case("all or nothing a hit", ids=True, change=case_changes.some_hits_only),
    Case(
        "refined, every candidate a hit of some",
        ids=True,
        change=case_changes.some_hits_only,
        options={"correction": "refined"},
    ),
    Case("ids past 2^24", ids=True, change=case_changes.large_ids(1 << 24)),
    Case("ids past 2^31", ids=True, change=case_changes.large_ids(1 << 31)),
    Case("ids past 2^40", ids=True, change=case_changes.large_ids(1 << 40)),
    Case("negative ids", ids=True, change=case_changes.large_ids(-6)),
    Case("int32 ids", ids=True, domains=2, change=case_changes.int32_ids),
    Case("a candidate of log-Q +inf", log_q=True, change=case_changes.log_q(torch.inf)),
    Case("a candidate of log-Q -inf", log_q=True, change=case_changes.log_q(-torch.inf)),
    Case("a positive of log-Q +inf", log_q=True, change=case_changes.positive_log_q(torch.inf)),
    Case("large logits", log_q=True, ids=True, change=case_changes.large_logits),
    Case("huge weights", **_FULL, change=case_changes.weights(1e30)),
    Case("tiny weights", **_FULL, change=case_changes.weights(1e-30)),
    *(
        Case(
            f"all weights zero, {r}",
            **_FULL,
            change=case_changes.weights(0.0),
            options={"reduction": r},
        )
        for r in ("mean", "weighted_mean", "sum", "none")
    ),
    Case("domains of weight zero", domains=2, change=case_changes.zero_domain),
    Case("NaN in the padding", **_FULL_ROWS, change=case_changes.padding_holds_nan),
    Case("in-batch", kind="in_batch"),
    Case("in-batch, one row", rows=1, kind="in_batch", log_q=True),
    Case("in-batch past the tile", rows=129, dim=96, kind="in_batch", **_FULL_ROWS),
    Case("in-batch with ids", kind="in_batch", log_q=True, ids=True),
    Case("mixed", kind="mixed", log_q=True, ids=True),
    Case("mixed without ids", kind="mixed", log_q=True, temperature="scalar"),
    Case("mixed, everything", rows=65, candidates=70, kind="mixed", **_FULL_ROWS),
    Case(
        "in-batch, refined",
        kind="in_batch",
        **_FULL_ROWS,
        options={"correction": "refined", "reduction": "weighted_mean"},
    ),
    Case(
        "in-batch, refined, candidates taken out",
        kind="mixed",
        **_FULL_ROWS,
        change=case_changes.remove,
        options={"correction": "refined"},
    ),
    Case("in-batch, none", kind="mixed", **_FULL_ROWS, options={"reduction": "none"}),
    Case(
        "in-batch, NaN in the padding",
        kind="mixed",
        **_FULL_ROWS,
        change=case_changes.padding_holds_nan,
    ),
    Case("in-batch, no rows", rows=0, kind="mixed", **_FULL),
    Case("full softmax", kind="full"),
    Case("full softmax, bias", kind="full", log_q=True, temperature="scalar"),
    Case("full softmax, past the tile", rows=129, candidates=127, kind="full", **_FULL_ROWS),
    Case("full softmax, many items", rows=3, candidates=1025, dim=96, kind="full", **_FULL),
    *(
        Case(f"full softmax, {r}", kind="full", **_FULL_ROWS, options={"reduction": r})
        for r in ("weighted_mean", "sum", "none")
    ),
    Case("full softmax, one item", candidates=1, kind="full"),
    Case("full softmax, no rows", rows=0, kind="full", **_FULL),
    Case("full softmax, all rows ignored", kind="full", **_FULL, change=case_changes.ignore_all),
    Case("full softmax, one target for all", kind="full", **_FULL, change=case_changes.one_target),
    Case(
        "full softmax, NaN in the padding",
        kind="full",
        **_FULL_ROWS,
        change=case_changes.padding_holds_nan,
    ),
    Case("dual scale", kind="dual", options={"slate_size": 4}),
    Case("dual scale, everything", kind="dual", **_FULL_ROWS),
    Case("dual scale, past the tile", rows=129, candidates=127, kind="dual", **_FULL_ROWS),
    Case("dual scale, hardness alone", kind="dual", options={"similarity": 0, "competition": 0}),
    Case("dual scale, similarity alone", kind="dual", options={"hardness": 0, "competition": 0}),
    Case("dual scale, competition alone", kind="dual", options={"hardness": 0, "similarity": 0}),
    Case(
        "dual scale, negative strengths",
        kind="dual",
        **_FULL_ROWS,
        options={"hardness": -0.2, "similarity": -0.5, "competition": -1.0, "slate_size": 4},
    ),
    Case(
        "dual scale, none",
        kind="dual",
        **_FULL_ROWS,
        options={"reduction": "none", "slate_size": 5},
    ),
    Case("dual scale, refined", kind="dual", **_FULL, options={"correction": "refined"}),
    Case(
        "dual scale, negatives taken out",
        kind="dual",
        log_q=True,
        change=case_changes.remove,
        options={"slate_size": 4},
    ),
    Case(
        "dual scale, mixed, refined, negatives taken out",
        kind="dual",
        **_FULL,
        change=case_changes.remove,
        options={"in_batch": True, "correction": "refined"},
    ),
    Case("dual scale, every candidate a hit", kind="dual", **_FULL, change=case_changes.all_hits),
    Case(
        "dual scale, some have no candidate",
        kind="dual",
        ids=True,
        change=case_changes.some_hits_only,
    ),
    Case("dual scale, no candidates", kind="dual", candidates=0, **_FULL),
    Case(
        "dual scale, NaN in the padding",
        kind="dual",
        **_FULL_ROWS,
        change=case_changes.padding_holds_nan,
    ),
    Case("dual scale, in-batch", kind="dual", change=case_changes.without_negatives),
    Case(
        "dual scale, in-batch, everything",
        kind="dual",
        **_FULL_ROWS,
        change=case_changes.without_negatives,
    ),
    Case("dual scale, mixed", kind="dual", log_q=True, options={"in_batch": True}),
    Case(
        "dual scale, mixed, NaN in the padding",
        kind="dual",
        **_FULL_ROWS,
        options={"in_batch": True, "slate_size": 5},
        change=case_changes.padding_holds_nan,
    ),
    Case("indexed", kind="indexed"),
    Case("indexed, everything", rows=65, candidates=70, kind="indexed", **_FULL_ROWS),
    Case("indexed, none", kind="indexed", **_FULL_ROWS, options={"reduction": "none"}),
    Case("indexed, no candidates", candidates=0, kind="indexed", **_FULL),
    Case("indexed, no rows", rows=0, kind="indexed", **_FULL),
    Case(
        "indexed, NaN in the padding",
        kind="indexed",
        **_FULL_ROWS,
        change=case_changes.ids_of_padding_are_anything,
    ),
    Case("by row", kind="indexed_rows"),
    Case("by row, one of everything", rows=1, candidates=1, dim=1, kind="indexed_rows"),
    Case("by row, everything", rows=129, candidates=31, kind="indexed_rows", **_FULL_ROWS),
    Case("by row, many candidates", rows=3, candidates=257, dim=96, kind="indexed_rows", **_FULL),
    Case("by row, many rows", rows=515, candidates=3, dim=1, kind="indexed_rows", **_FULL),
    *(
        Case(f"by row, {r}", kind="indexed_rows", **_FULL_ROWS, options={"reduction": r})
        for r in ("weighted_mean", "sum", "none")
    ),
    Case("by row, scalar temperature", kind="indexed_rows", temperature="scalar"),
    Case("by row, int32 ids", kind="indexed_rows", change=case_changes.int32_rows),
    Case("by row, refined", kind="indexed_rows", **_FULL_ROWS, options={"correction": "refined"}),
    Case(
        "by row, every candidate a hit", kind="indexed_rows", **_FULL, change=case_changes.own_ids
    ),
    Case(
        "by row, refined, every candidate a hit",
        kind="indexed_rows",
        change=case_changes.own_ids,
        options={"correction": "refined"},
    ),
    Case("by row, one id for all", kind="indexed_rows", **_FULL, change=case_changes.one_id),
    Case(
        "by row, candidates of log-Q +inf",
        kind="indexed_rows",
        log_q=True,
        change=case_changes.candidate_log_q_per_row,
    ),
    Case(
        "by row, refined, candidates of log-Q +inf",
        kind="indexed_rows",
        log_q=True,
        change=case_changes.candidate_log_q_per_row,
        options={"correction": "refined"},
    ),
    Case("by row, large logits", kind="indexed_rows", log_q=True, change=case_changes.large_logits),
    Case("by row, huge weights", kind="indexed_rows", **_FULL, change=case_changes.weights(1e30)),
    Case(
        "by row, all weights zero", kind="indexed_rows", **_FULL, change=case_changes.weights(0.0)
    ),
    Case("by row, no candidates", candidates=0, kind="indexed_rows", **_FULL),
    Case("by row, no rows", rows=0, kind="indexed_rows", **_FULL),
    Case(
        "by row, NaN in the padding",
        kind="indexed_rows",
        **_FULL_ROWS,
        change=case_changes.ids_of_padding_are_anything,
    ),
    Case("embeddings by row", kind="rows"),
    Case("embeddings by row, one of everything", rows=1, candidates=1, dim=1, kind="rows"),
    Case("embeddings by row, everything", rows=33, candidates=31, kind="rows", **_FULL_ROWS),
    *(
        Case(f"embeddings by row, {r}", kind="rows", **_FULL_ROWS, options={"reduction": r})
        for r in ("weighted_mean", "none")
    ),
    Case("embeddings by row, refined", kind="rows", **_FULL, options={"correction": "refined"}),
    Case("embeddings by row, every one a hit", kind="rows", **_FULL, change=case_changes.all_hits),
    Case("embeddings by row, no candidates", candidates=0, kind="rows", **_FULL),
    Case("embeddings by row, no rows", rows=0, kind="rows", **_FULL),
    Case(
        "embeddings by row, NaN in the padding",
        kind="rows",
        **_FULL_ROWS,
        change=case_changes.padding_holds_nan,
    ),
    *(
        Case(
            f"{kind}, padding by id",
            kind=kind,
            log_q=kind != "mixed",
            ids=True,
            change=case_changes.padding_by_id,
            options={"ignore_index": -100},
        )
        for kind in ("sampled", "rows", "mixed", "dual", "indexed", "indexed_rows")
    ),
    Case(
        "mixed, refined, padding by id",
        kind="mixed",
        **_FULL,
        change=case_changes.padding_by_id,
        options={"ignore_index": -100, "correction": "refined"},
    ),
    *(
        Case(f"{kind}, items in several rows", kind=kind, change=case_changes.table_ids)
        for kind in ("full", "indexed", "indexed_rows")
    ),
    Case("full, items in several rows, bias", kind="full", **_FULL, change=case_changes.table_ids),
    *(
        Case(
            f"{kind}, hits stay",
            kind=kind,
            **_FULL,
            change=case_changes.own_ids_and_no_items,
            options={"remove_accidental_hits": False, "correction": correction},
        )
        for kind, correction in (("indexed", "standard"), ("indexed_rows", "refined"))
    ),
    *(
        Case(f"{kind}, positives of a query", kind=kind, change=case_changes.query_ids)
        for kind in ("in_batch", "mixed")
    ),
    Case(
        "mixed, positives of a query, everything",
        rows=65,
        kind="mixed",
        **_FULL_ROWS,
        change=case_changes.query_ids,
    ),
    Case(
        "mixed, positives of a query, refined",
        kind="mixed",
        **_FULL_ROWS,
        change=case_changes.query_ids,
        options={"correction": "refined", "reduction": "none"},
    ),
    Case(
        "in-batch, positives of a query, refined",
        kind="in_batch",
        ids=True,
        change=case_changes.query_ids,
        options={"correction": "refined"},
    ),
    *(
        Case(
            f"dual scale, mixed, positives of a query, {ids}",
            kind="dual",
            ids=ids,
            change=case_changes.query_ids,
            options={"in_batch": True, "slate_size": 4},
        )
        for ids in (False, True)
    ),
]
