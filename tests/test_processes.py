"""The processes of a group that tests call: they answer in order, and what fails does not hang."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from processes import RankError


def total(start):
    counts = torch.tensor([start + dist.get_rank()])
    dist.all_reduce(counts)
    return int(counts), dist.get_rank()


def raises_on(rank):
    if dist.get_rank() == rank:
        raise ValueError("no such thing")
    return total(0)


def dies_on(rank):
    if dist.get_rank() == rank:
        os._exit(3)


def sleeps_on(rank):
    if dist.get_rank() == rank:
        time.sleep(60)


def process():
    return os.getpid()


def test_ranks_answer_in_order_and_are_started_once(ranks):
    first = ranks(process)
    wanted = 5 * ranks.size + sum(range(ranks.size))
    assert ranks(total, 5) == [(wanted, rank) for rank in range(ranks.size)]
    assert ranks(process) == first
    assert len(set(first)) == ranks.size


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises_on, r"rank 1 of 2: Traceback(.|\n)*no such thing"),
        (dies_on, "rank 1 of 2: died"),
        (sleeps_on, "rank 1 of 2 did not answer"),
    ],
)
def test_failure_names_the_rank_and_the_next_call_works(two_ranks, function, message):
    with pytest.raises(RankError, match=message):
        two_ranks(function, 1, seconds=2.0)
    assert two_ranks(total, 0) == [(1, 0), (1, 1)]
