"""The cases that every backend must pass, and the comparison with `eager` in float64.

A case is a small problem with one thing that is easy to get wrong. The sizes are no multiple of any
tile: 1, 3, 17, 127 and 129 rows or candidates, 1, 20 and 96 dimensions.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import case_changes
import torch
from torch import Tensor

import dwl_kernels

# What a backend may add to twice the error of eager in its own dtype, relative to the largest
# entry of the reference.
MARGIN = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 4e-3,
}
DIFFERENTIABLE = (
    *("query", "positive", "negative", "table", "bias"),
    *("temperature", "domain_weights"),
)

TABLE_ROWS = 41  # of the table from which indexed candidates are drawn

NOT_IN_CUDA = {"dual", "indexed_rows", "rows"}  # kinds that its kernel does not take

Inputs = dict[str, Any]
Formula = Callable[[str, Inputs], Tensor]  # of a kind and its inputs, in the place of a backend


@dataclass(frozen=True)
class Case:
    name: str
    rows: int = 17
    candidates: int = 33  # of `negative`
    dim: int = 20
    # "in_batch", "mixed" (both candidates), "full" (log_q: a bias), "dual", "indexed" (ids in the
    # place of positives and negatives), "indexed_rows" and "rows" (every row has ids, or negatives,
    # of its own)
    kind: str = "sampled"
    log_q: bool = False
    ids: bool = False
    domains: int = 0  # slots per row
    examples: bool = False
    temperature: str = "float"  # "scalar" and "rows" are tensors with a gradient
    options: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Inputs], None] | None = None
    frozen: tuple[str, ...] = ()  # what takes no gradient

    @property
    def in_cuda(self) -> bool:
        """Whether the kernel of the CUDA backend takes it."""
        both_ids = self.ids and self.change is case_changes.query_ids
        return self.kind not in NOT_IN_CUDA and not both_ids

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> Inputs:
        """Keyword arguments of the loss; leaves that take a gradient require it."""
        g = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        b, n, d = self.rows, self.candidates, self.dim

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        def integers(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=g)

        inputs: Inputs = {"query": normal(b, d), "positive": normal(b, d), "temperature": 0.7}
        prefix = "" if self.kind in ("in_batch", "mixed") else "positive_"
        inputs["negative"] = normal(n, d)
        if self.log_q:
            inputs[prefix + "log_q"] = torch.log_softmax(normal(b), 0)
            inputs["negative_log_q"] = torch.log_softmax(normal(n), 0)
        if self.ids:
            inputs[prefix + "ids"] = integers(0, 12, b)
            inputs["negative_ids"] = integers(0, 12, n)
        if self.kind == "rows":
            inputs["negative"] = normal(b, n, d)
            if self.log_q:
                inputs["negative_log_q"] = torch.log_softmax(normal(b, n), 1)
            if self.ids:
                inputs["negative_ids"] = integers(0, 12, b, n)
        elif self.kind == "in_batch":
            inputs = {k: v for k, v in inputs.items() if not k.startswith("negative")}
        elif self.kind == "full":
            full = {"query": inputs["query"], "table": inputs["negative"]}
            full["target"] = integers(0, n, b)
            full["target"][1::4] = -100
            if self.log_q:
                full["bias"] = inputs["negative_log_q"]
            inputs = {**full, "temperature": 0.7}
        elif self.kind.startswith("indexed"):
            per_row = self.kind == "indexed_rows"
            shape = (b, n) if per_row else (n,)
            indexed = {"query": inputs["query"], "table": normal(TABLE_ROWS, d)}
            # Few different ids: duplicates inside a row, across rows, and of the positives.
            indexed["positive_ids"] = integers(0, 12, b)
            indexed["negative_ids"] = integers(0, TABLE_ROWS, *shape)
            if self.log_q:
                indexed["positive_log_q"] = inputs["positive_log_q"]
                indexed["negative_log_q"] = inputs["negative_log_q"]
                if per_row:
                    indexed["negative_log_q"] = torch.log_softmax(normal(b, n), 1)
            inputs = {**indexed, "temperature": 0.7}
        if self.domains:
            shape = (b,) if self.domains == 1 else (b, self.domains)
            inputs["domain_ids"] = each_once(integers(-1, 5, *shape))
            inputs["domain_weights"] = normal(5).exp()
        if self.examples:
            inputs["example_weights"] = normal(b).exp() * (integers(0, 3, b) > 0)
        if self.temperature == "scalar":
            inputs["temperature"] = torch.tensor(0.6, dtype=torch.float64)
        elif self.temperature == "rows":
            inputs["temperature"] = 0.3 + normal(b).exp()
        if self.change is not None:
            self.change(inputs)
        for name, value in inputs.items():
            if not isinstance(value, Tensor):
                continue
            if value.is_floating_point():
                embedding = name in ("query", "positive", "negative", "table")
                narrow = dtype if embedding or dtype == torch.float64 else torch.float32
                value = value.to(narrow)
            learned = name in DIFFERENTIABLE and name not in self.frozen
            inputs[name] = value.to(device).requires_grad_(learned)
        return inputs | self.options

    def loss(self, inputs: Inputs, backend: str | Formula) -> Tensor:
        if not isinstance(backend, str):
            return backend(self.kind, inputs)
        function = {
            "sampled": dwl_kernels.sampled_softmax_loss,
            "rows": dwl_kernels.sampled_softmax_loss,
            "in_batch": dwl_kernels.in_batch_softmax_loss,
            "mixed": dwl_kernels.in_batch_softmax_loss,
            "full": dwl_kernels.full_softmax_loss,
            "indexed": dwl_kernels.indexed_sampled_softmax_loss,
            "indexed_rows": dwl_kernels.indexed_sampled_softmax_loss,
            "dual": dwl_kernels.dual_scale_softmax_loss,
        }[self.kind]
        return function(**inputs, backend=backend)


def loss_and_gradients(
    case: Case,
    backend: str | Formula,
    dtype: torch.dtype,
    device: str = "cpu",
    upcast: bool = False,
) -> dict[str, Tensor]:
    """The loss and all gradients under a random upstream gradient, in float64.

    `upcast` computes in float64 from the same rounded inputs: the reference.
    """
    inputs = case.inputs(dtype, device)
    if upcast:
        inputs = {
            k: v.detach().double().requires_grad_(v.requires_grad)
            if isinstance(v, Tensor) and v.is_floating_point()
            else v
            for k, v in inputs.items()
        }
    loss = case.loss(inputs, backend)
    g = torch.Generator().manual_seed(1)
    upstream = torch.randn(loss.shape, generator=g, dtype=torch.float64).to(loss)
    leaves = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad}
    gradients = torch.autograd.grad(loss, list(leaves.values()), upstream) if leaves else ()
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        assert gradient.dtype == leaf.dtype, name
        assert gradient.shape == leaf.shape, name
    results = {"loss": loss, **dict(zip(leaves, gradients, strict=True))}
    dense = {k: v.to_dense() if v.is_sparse else v for k, v in results.items()}
    return {name: value.detach().double().cpu() for name, value in dense.items()}


def error(value: Tensor, reference: Tensor) -> float:
    """Largest difference over the largest finite reference entry; inf and NaN must coincide."""
    finite = reference.isfinite()
    if not torch.equal(value[~finite].nan_to_num(7.0), reference[~finite].nan_to_num(7.0)):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = float(reference[finite].abs().max())
    difference = float((value[finite] - reference[finite]).abs().max())
    if difference != difference:
        return float("inf")
    return difference / scale if scale > 0 else (0.0 if difference == 0 else float("inf"))


def check(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Fails unless `backend` is as exact as design section 7 of the formulas asks."""
    reference = loss_and_gradients(case, "eager", dtype, upcast=True)
    same_dtype = loss_and_gradients(case, "eager", dtype)
    got = loss_and_gradients(case, backend, dtype, device)
    assert got.keys() == reference.keys()
    for name, value in got.items():
        allowed = 2 * error(same_dtype[name], reference[name]) + MARGIN[dtype]
        measured = error(value, reference[name])
        assert measured <= allowed, f"{name}: error {measured:.2e}, allowed {allowed:.2e}"


def each_once(domain_ids: Tensor) -> Tensor:  # [M] or [M, G]
    """-1 in the place of a domain that its row has named before."""
    if domain_ids.dim() == 1:
        return domain_ids
    again = (domain_ids[:, :, None] == domain_ids[:, None, :]).tril(-1).any(-1)
    return domain_ids.masked_fill(again, -1)


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
