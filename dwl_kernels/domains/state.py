"""The counts and averages that `DomainWeights` keeps, how they move, and their checkpoints."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dwl_kernels.core.arguments import (
    integers,
)
from dwl_kernels.core.buffers import difference, on_host
from dwl_kernels.core.values import check_distinct, checks_values
from dwl_kernels.counts import Counts
from dwl_kernels.domains.ids import check_range, dense, slots_of

# An interaction with an item of G domains counts 1/G for each of them. Kept as integers in units
# that every G up to 16 divides: exact, the same in every run on a GPU, and safe from `.half()`.
WHOLE = 720_720


MOMENTUM_ROWS = 1024  # rows after which `momentum` of the old average is left


class DomainState(Counts):
    """What is counted, on the device of the module; `DomainWeights` has the public face."""

    weights: Tensor  # [num_domains] float32, what goes to the loss
    average: Tensor  # [num_domains] float32, moving average before normalisation
    interactions: Tensor  # [num_domains] int64, n_d
    shares: Tensor  # [num_domains] int64, interactions split over their domains, in 1/_WHOLE
    users: Tensor  # [num_domains] int64, u_d
    entropy: Tensor  # [num_domains] float32, H_d in nats
    num_users: Tensor  # [] int64, U; 0 while users and entropy are not measured
    num_items: Tensor  # [] int64, I
    steps: Tensor  # [] int64, updates so far
    arguments: Tensor  # [5] float32, what the average depends on; for checkpoints to be compared

    num_domains: int
    measures: tuple[float, ...]
    weight_range: tuple[float, ...]
    momentum: float
    start: int
    full: int
    fixed: bool  # whether the weights are given and not measured

    def _register(self) -> None:
        """Nothing seen yet: every domain is as sparse as can be, and all weigh the same."""
        with on_host():
            self._register_count("weights", torch.ones(self.num_domains, dtype=torch.float32))
            average = torch.full((self.num_domains,), self.weight_range[1], dtype=torch.float32)
            self._register_count("average", average)
            for name in ("interactions", "shares", "users"):
                self._register_count(name, torch.zeros(self.num_domains, dtype=torch.int64))
            self._register_count("entropy", torch.zeros(self.num_domains, dtype=torch.float32))
            for name in ("num_users", "num_items", "steps"):
                self._register_count(name, torch.zeros((), dtype=torch.int64))
            self._register_count("arguments", self._arguments())
        self._settle()

    def sparsity(self) -> Tensor:
        """How sparse each domain is by what was measured.

        Returns:
            ``s_d``, ``[num_domains]`` float32 in [0, 1]; 1 for a domain never seen.
        """
        n = self.interactions
        total = torch.div(self.shares.sum(), WHOLE, rounding_mode="floor")
        rarity = (total.float() / n.clamp(min=1).float()).log().clamp(min=0)
        rarity = torch.where(n > 0, rarity, 0.0)
        largest = rarity.max()
        # A domain that every interaction has is not sparse: 0, not 0/0.
        idf = torch.where(largest > 0, rarity / largest, 0.0)
        alpha, beta, gamma = self.measures
        users = 1 - self.users.float() / self.num_users.clamp(min=1).float()
        entropy = 1 - self.entropy / self.num_items.clamp(min=2).float().log()
        mixed = (alpha * idf + beta * users + gamma * entropy) / (alpha + beta + gamma)
        measured = torch.where(self.num_users > 0, mixed, idf)
        return torch.where(n > 0, measured, 1.0).clamp(0.0, 1.0)

    def _checked_ids(
        self,
        domain_ids: Tensor,  # [B] or [B, G]
    ) -> Tensor:  # [B, G] int64
        """The ids, checked."""
        ids = slots_of("domain_ids", integers("domain_ids", domain_ids, self.weights.device))
        if ids.device != self.weights.device:
            raise ValueError(
                f"domain_ids is on {ids.device} but the domain weights are on "
                f"{self.weights.device}; move one of them"
            )
        check_range("domain_ids", ids, self.num_domains, "domains")
        return ids

    def _count(
        self,
        ids: Tensor,  # [B, G] int64
        counted: Tensor,  # [B, G] bool, within [0, num_domains)
        interactions: Tensor,  # [num_domains] to be added to, like the next
        shares: Tensor,  # [num_domains]
    ) -> Tensor:  # [] rows with a domain
        # One bin more takes what is not counted: no shape depends on the data, hence no sync.
        bins = torch.where(counted, ids, self.num_domains).flatten()
        per_slot = torch.div(
            WHOLE, counted.sum(1, keepdim=True).clamp(min=1), rounding_mode="floor"
        )
        for total, amount in (
            (interactions, torch.ones_like(ids)),
            (shares, per_slot.expand_as(ids)),
        ):
            new = total.new_zeros(self.num_domains + 1)
            total.add_(new.index_add_(0, bins, amount.flatten())[:-1])
        return counted.any(1).sum()

    def _measure(
        self,
        slots: Tensor,  # [M, G] int64, of rows that have a domain
        users: Tensor,  # [M]
        items: Tensor,  # [M]
    ) -> None:
        """Users and item entropy of every domain, when its interactions have been counted."""
        row, slot = (slots >= 0).nonzero(as_tuple=True)
        domain = slots[row, slot]  # [P], one entry per pair of interaction and domain
        num_users, user_of = dense(users)
        num_items, item_of = dense(items)
        self.num_users.fill_(num_users)
        self.num_items.fill_(num_items)
        pairs = torch.unique(domain * num_users + user_of[row])
        if num_users:
            self.users.copy_(torch.bincount(pairs // num_users, minlength=self.num_domains))
        if num_items:
            pairs, times = torch.unique(domain * num_items + item_of[row], return_counts=True)
            # H_d = log n_d - sum_items c log c / n_d, for item counts c
            surprise = torch.bincount(
                pairs // num_items, weights=times.double() * times.log(), minlength=self.num_domains
            )
            n = self.interactions.clamp(min=1).double()
            self.entropy.copy_((n.log() - surprise / n).clamp(min=0))

    def extra_repr(self) -> str:
        if self.fixed:
            text = f"{self.num_domains}, constant"
        else:
            text = (
                f"{self.num_domains}, measures={self.measures}, weight_range={self.weight_range}, "
                f"momentum={self.momentum}"
            )
        return f"{text}, start={self.start}, full={self.full}" if self.full else text

    def _update(
        self,
        ids: Tensor,  # [B, G] int64
        counted_step: Tensor | None = None,  # [] 0 where this is a second run; else a step
    ) -> None:
        if checks_values(ids):
            check_distinct("domain_ids", ids)
        counted = (ids >= 0) & (ids < self.num_domains)
        if not self._alone():
            self._keep(ids, counted)
            return
        rows = self._count(ids, counted, self.interactions, self.shares)
        # From `rows`: what depends on no input would run while `torch.export` traces, and count.
        self.steps.add_(torch.ones_like(rows) if counted_step is None else counted_step)
        self._follow(rows)

    def _nothing_pending(self) -> Tensor:
        return torch.zeros(2 * self.num_domains + 1, dtype=torch.int64)

    def _keep(self, *seen: Tensor) -> None:
        ids, counted = seen
        *totals, rows = self._pending().split((self.num_domains, self.num_domains, 1))
        rows += self._count(ids, counted, *totals)

    def _apply_pending(self, pending: Tensor, updates: int) -> None:
        interactions, shares, rows = pending.split((self.num_domains, self.num_domains, 1))
        self.interactions += interactions
        self.shares += shares
        self.steps += updates
        self._follow(rows[0])

    def _follow(self, rows: Tensor) -> None:
        """Moves the average by so many rows, ``[]``, that were counted."""
        if self.fixed:
            return
        if self.momentum:
            # 1 - m^(rows / 1024); a few rows change so little that float32 needs expm1 for it.
            self._move(-torch.expm1(rows.float() * (math.log(self.momentum) / MOMENTUM_ROWS)))
        else:
            self._move((rows > 0).float())

    def _move(self, share: float | Tensor) -> None:
        """The average goes this share of its way."""
        low, high = self.weight_range
        target = low + (high - low) * self.sparsity()
        moved = torch.lerp(self.average, target, share)
        self.average.copy_(moved.clamp(low, high))  # the clamp only removes rounding
        self.weights.copy_(of_mean_one(self.average, self.shares))

    def _arguments(self) -> Tensor:  # [5]
        shares = [measure / sum(self.measures) for measure in self.measures]
        with on_host():
            return torch.tensor([*self.weight_range, *shares], dtype=torch.float32)

    def _contradiction(self, saved: dict[str, Tensor]) -> str | None:
        if self.fixed:
            text = difference("weights", saved, self.weights)
            text = text or difference("average", saved, self.average)
            return text and (
                f"{text}, where weights are constant; build the module with the weights of the "
                "checkpoint, or, to go on with these, delete weights and average from it"
            )
        if "interactions" in saved and "average" not in saved:
            return (
                "the checkpoint was written with constant weights, but those of this module are "
                f"measured, with weight_range={self.weight_range}; give the module the constant "
                "weights, or load the checkpoint without this part"
            )
        own = self._arguments()
        if "arguments" in saved:
            if difference("arguments", saved, own) is None:
                return None
            theirs = [float(f"{number:.6g}") for number in saved["arguments"].tolist()]
            return (
                f"weight_range is {tuple(theirs[:2])} and measures is in proportion to "
                f"{tuple(theirs[2:])} in the checkpoint, but {self.weight_range} and "
                f"{self.measures} here; build the module with those of the checkpoint"
            )
        # Earlier versions saved no arguments, but an average that lies within its range, and
        # weights that follow from it, unlike constant ones.
        average, shares = saved.get("average"), saved.get("shares")
        if average is None or shares is None or average.shape != shares.shape:
            return None
        low, high = own[:2].tolist()
        rounding = torch.finfo(average.dtype).eps
        if bool(((average < low * (1 - rounding)) | (average > high * (1 + rounding))).any()):
            extremes = f"[{average.min().item():.6g}, {average.max().item():.6g}]"
            return (
                f"average lies within {extremes} in the checkpoint, but weight_range is "
                f"{self.weight_range} here; build the module with that of the checkpoint"
            )
        text = difference("weights", saved, of_mean_one(average, shares))
        return text and (
            f"{text} by its average and shares: the checkpoint was written with constant weights, "
            "but those of this module are measured; give the module the constant weights"
        )

    def _bring_up_to_date(self, state_dict: dict[str, Any], prefix: str) -> None:
        if self._loaded_version > 1:
            return
        if not self.fixed and prefix + "average" in state_dict:
            # Anew, because a module that was made on `meta` holds anything before it is loaded.
            state_dict.setdefault(prefix + "arguments", self._arguments())
        if prefix + "interactions" in state_dict:
            state_dict.setdefault(prefix + "steps", torch.zeros((), dtype=torch.int64))


def of_mean_one(
    average: Tensor,  # [num_domains]
    shares: Tensor,  # [num_domains]
) -> Tensor:  # [num_domains]
    """The average over its mean, in which a domain has the share of its interactions."""
    seen = shares.float()
    seen = torch.where(seen.sum() > 0, seen, 1.0)
    return average / (seen / seen.sum() * average).sum()
