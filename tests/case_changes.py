"""What cases change of their inputs, so that one thing is easy to get wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Inputs = dict[str, Any]


def set(**values: Any) -> Callable[[Inputs], None]:
    return lambda inputs: inputs.update(values)


def all_hits(inputs: Inputs) -> None:
    inputs["positive_ids"].fill_(3)
    inputs["negative_ids"].fill_(3)


def some_hits_only(inputs: Inputs) -> None:
    inputs["positive_ids"][::2] = 3
    inputs["negative_ids"].fill_(3)


def large_ids(offset: int) -> Callable[[Inputs], None]:
    # Neighbours that float32 (past 2^24) or 32 bits (past 2^31) cannot tell apart.
    def change(inputs: Inputs) -> None:
        for name in ("positive_ids", "negative_ids"):
            inputs[name] = inputs[name] + offset

    return change


def int32_ids(inputs: Inputs) -> None:
    for name in ("positive_ids", "negative_ids", "domain_ids"):
        inputs[name] = inputs[name].int()


def log_q(value: float) -> Callable[[Inputs], None]:
    def change(inputs: Inputs) -> None:
        inputs["negative_log_q"][5] = value

    return change


def positive_log_q(value: float) -> Callable[[Inputs], None]:
    def change(inputs: Inputs) -> None:
        inputs["positive_log_q"][2] = value

    return change


def remove(inputs: Inputs) -> None:
    """Negatives that their log-Q takes out; some are hits as well. In a batch, positives too."""
    if "negative_log_q" in inputs:
        inputs["negative_log_q"][2::5] = torch.inf
    if "log_q" in inputs:
        inputs["log_q"][[2, 5, 6]] = -torch.inf
        inputs["ids"][5] = -1


def large_logits(inputs: Inputs) -> None:
    inputs["query"] *= 1e4 / 20


def duplicates(inputs: Inputs) -> None:
    inputs["negative"][10:20] = inputs["negative"][:10]
    inputs["negative_ids"][10:20] = inputs["negative_ids"][:10]


def weights(value: float) -> Callable[[Inputs], None]:
    return lambda inputs: inputs["example_weights"].fill_(value)


def zero_domain(inputs: Inputs) -> None:
    inputs["domain_weights"][:2] = 0.0


def ignore_all(inputs: Inputs) -> None:
    inputs["target"].fill_(-100)


def one_target(inputs: Inputs) -> None:
    inputs["target"].fill_(5)


def own_ids(inputs: Inputs) -> None:
    """Every negative of every second row is its positive."""
    inputs["negative_ids"][::2] = inputs["positive_ids"][::2, None]


def one_id(inputs: Inputs) -> None:
    inputs["negative_ids"].fill_(40)


def int32_rows(inputs: Inputs) -> None:
    for name in ("positive_ids", "negative_ids"):
        inputs[name] = inputs[name].int()


def candidate_log_q_per_row(inputs: Inputs) -> None:
    inputs["negative_log_q"][3, 5] = torch.inf
    inputs["negative_log_q"][4] = torch.inf


def ids_of_padding_are_anything(inputs: Inputs) -> None:
    padding_holds_nan(inputs)
    padded = inputs["example_weights"] == 0
    inputs["positive_ids"][padded] = 1 << 40
    if inputs["negative_ids"].dim() == 2:
        inputs["negative_ids"][padded] = -5
        inputs["negative_log_q"][padded] = torch.nan


def no_domain(inputs: Inputs) -> None:
    inputs["domain_ids"].fill_(-1)


def all_domains(inputs: Inputs) -> None:
    """Every row names as many as there is room for."""
    rows, slots = inputs["domain_ids"].shape
    inputs["domain_ids"] = (torch.arange(rows)[:, None] + torch.arange(slots)) % 5


def without_negatives(inputs: Inputs) -> None:
    for name in [name for name in inputs if name.startswith("negative")]:
        del inputs[name]


def padding_holds_nan(inputs: Inputs) -> None:
    padded = inputs["example_weights"] == 0
    padded[0] = True
    inputs["example_weights"][0] = 0.0
    if "target" in inputs:
        inputs["target"][0] = -100
        padded |= inputs["target"] == -100
    for name in ("query", "positive", "log_q", "positive_log_q"):
        if name in inputs:
            inputs[name][padded] = torch.nan


def table_ids(inputs: Inputs) -> None:
    """Every item stands in three rows of the table, and some rows are none."""
    inputs["table_ids"] = torch.arange(len(inputs["table"])) // 3
    inputs["table_ids"][3::7] = -1
    if "target" in inputs:
        inputs["target"] += inputs["target"] % 7 == 3


def padding_by_id(inputs: Inputs) -> None:
    """Ids of -100 on both sides, and of -1, which is another thing; NaN in the padded rows."""
    own = "ids" if "ids" in inputs else "positive_ids"
    padded = torch.arange(len(inputs[own])) % 4 == 1
    inputs[own][padded] = -100
    inputs["negative_ids"].view(-1)[1::5] = -100
    inputs["negative_ids"].view(-1)[2::5] = -1
    for name in ("query", "positive"):
        if name in inputs:
            inputs[name][padded] = torch.nan


def own_ids_and_no_items(inputs: Inputs) -> None:
    inputs["negative_ids"].view(-1)[:9] = inputs["positive_ids"][:9]
    inputs["negative_ids"].view(-1)[9:12] = -1


def query_ids(inputs: Inputs) -> None:
    """Some queries have several positives, some none but their own, and some rows no query."""
    rows = torch.arange(len(inputs["query"]))
    inputs["query_ids"] = (rows // 3 * 5 % 11 + (1 << 33)).masked_fill(rows % 7 == 2, -1)
    for name in ("ids", "positive_ids"):
        if name in inputs:
            inputs[name][::5] = -1
