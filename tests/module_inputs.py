"""What the tests of the modules share: inputs of the losses, and the comparison of two losses."""

from __future__ import annotations

import functools

import torch
from cases import each_once

from dwl_kernels import (
    CumulativeCrossEntropy,
    DualScaleSampledSoftmax,
    DynamicWeightedSampledSoftmax,
)
from dwl_kernels.core.problem import accumulate_dtype

# Sizes that differ from each other, so that a mixed-up dimension cannot pass. Float64 and `eager`:
# the backends have tests of their own.
B, N, D, DOMAINS, ITEMS, G = 6, 9, 4, 3, 20, 2


def embeddings(seed=0, rows=(B,), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*shape, D, generator=generator, dtype=dtype).requires_grad_()
        for shape in (rows, rows, (N,))
    ]


def draws(seed=0):
    """Ids of items and domains, and log-Q."""
    generator = torch.Generator().manual_seed(100 + seed)
    return {
        "domain_ids": torch.randint(0, DOMAINS, (B,), generator=generator),
        "positive_ids": torch.randint(0, ITEMS, (B,), generator=generator),
        "negative_ids": torch.randint(0, ITEMS, (N,), generator=generator),
        "positive_log_q": _log_q(B, generator),
        "negative_log_q": _log_q(N, generator),
    }


def _log_q(count, generator):
    """At most 0, by as much as the weights of the tests may lift it."""
    return -1.5 - torch.randn(count, generator=generator, dtype=torch.float64).abs()


def item_domains(seed=0):
    generator = torch.Generator().manual_seed(200 + seed)
    return each_once(torch.randint(-1, DOMAINS, (ITEMS, G), generator=generator))


def fixed(**options):
    options = {"weights": [0.5, 1.0, 3.0], "temperature": 0.7, "backend": "eager"} | options
    return DynamicWeightedSampledSoftmax(**options)


def table_of(dtype=torch.float64, seed=0):
    """The embeddings of all items."""
    generator = torch.Generator().manual_seed(300 + seed)
    return torch.randn(ITEMS, D, generator=generator, dtype=dtype).requires_grad_()


# Every module, and every way to say what its candidates are.
KINDS = {
    "sampled": DynamicWeightedSampledSoftmax,
    "in-batch": DynamicWeightedSampledSoftmax,
    "table": DynamicWeightedSampledSoftmax,
    "by row": DynamicWeightedSampledSoftmax,
    "dual scale": functools.partial(DualScaleSampledSoftmax, hardness=1.0, similarity=1.0),
    "cross-entropy": CumulativeCrossEntropy,
}


def call(kind, loss_fn, query, table, ids=None, **more):
    """The loss of a kind, of items drawn from a table; domains by item."""
    ids = draws() if ids is None else ids
    positive_ids, negative_ids = ids["positive_ids"], ids["negative_ids"]
    log_q = {
        name: ids[name].to(accumulate_dtype(query.dtype))
        for name in ("positive_log_q", "negative_log_q")
    }
    if kind == "cross-entropy":
        return loss_fn(query, table, positive_ids, **more)
    if kind == "in-batch":
        return loss_fn(
            *(query, table[positive_ids]),
            positive_ids=positive_ids,
            positive_log_q=log_q["positive_log_q"],
            **more,
        )
    if kind in ("table", "by row"):
        if kind == "by row":
            negative_ids = (negative_ids + torch.arange(B)[:, None]) % ITEMS
            log_q["negative_log_q"] = log_q["negative_log_q"].expand(B, N)
        embeddings = {"table": table}
    else:
        embeddings = {"positive": table[positive_ids], "negative": table[negative_ids]}
    named = {"positive_ids": positive_ids, "negative_ids": negative_ids, **log_q}
    return loss_fn(query, **embeddings, **named, **more)


def assert_same(got, wanted, inputs):
    """The same loss and the same gradients."""
    torch.testing.assert_close(got, wanted)
    pairs = [torch.autograd.grad(loss.sum(), inputs, retain_graph=True) for loss in (got, wanted)]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other)
