"""A two-tower model of users and items, from ratings to ten recommendations.

``python -m dwl_kernels.examples.two_tower [--data path/to/ml-1m] [--steps 1000]``, ten seconds. The
other items of a batch are the negatives. Popular ones come more often, which log-Q takes back.

``torchrun --nproc-per-node 2 -m dwl_kernels.examples.two_tower`` splits the batch over two
processes, each of which scores the items of both.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dwl_kernels import DynamicWeightedSampledSoftmax
from dwl_kernels.examples.data import Interactions, from_command_line


def split(data: Interactions) -> tuple[Tensor, Tensor, Tensor]:
    """Users and items of the training interactions, and the last item of every user, for tests."""
    users, items = torch.from_numpy(data.users), torch.from_numpy(data.items)
    last = torch.from_numpy(data.offsets[1:] - 1)
    train = torch.ones(len(items), dtype=torch.bool).index_fill_(0, last, False)
    return users[train], items[train], items[last]


class Towers(nn.Module):
    """A tower may be any module that makes an embedding; the simplest is a table."""

    def __init__(self, num_users: int, num_items: int, dim: int) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(num_users, dim), nn.Embedding(num_items, dim)
        for tower in (self.users, self.items):
            nn.init.normal_(tower.weight, std=0.05)

    def forward(self, user: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        return self.users(user), self.items(item)


def train(data: Interactions, log_q: bool = True, steps: int = 1000, dim: int = 64) -> Tensor:
    """Scores of all items for all users, ``[U, V]``, -inf for what a user has taken already."""
    torch.manual_seed(0)
    user, item, _ = split(data)
    counts = torch.bincount(item, minlength=data.num_items).clamp(min=1)
    log_probability = (counts / counts.sum()).log()  # of an item in one place of a batch
    towers = Towers(data.num_users, data.num_items, dim)
    model: nn.Module = towers
    group, ranks = None, 1
    if dist.is_initialized():
        group, ranks = dist.group.WORLD, dist.get_world_size()
        model = nn.parallel.DistributedDataParallel(towers)
        torch.manual_seed(1 + dist.get_rank())  # every rank draws rows of its own
    loss_fn = DynamicWeightedSampledSoftmax(process_group=group)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = torch.randint(len(item), (1024 // ranks,))
        u, i = user[rows], item[rows]
        correction = log_probability[i] if log_q else None
        loss = loss_fn(*model(u, i), positive_ids=i, positive_log_q=correction)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():  # serving: dot products with all items
        scores = towers.users.weight @ towers.items.weight.T
    return scores.index_put_((user, item), torch.tensor(-torch.inf))


if __name__ == "__main__":
    data, steps = from_command_line(__doc__, steps=1000)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    user, item, last = split(data)
    popular = torch.bincount(item, minlength=data.num_items).float().repeat(data.num_users, 1)
    popular[user, item] = -torch.inf
    scores = train(data, steps=steps)
    if dist.is_initialized() and dist.get_rank() > 0:
        raise SystemExit  # the first rank prints
    for name, ranking in (("two towers", scores), ("by popularity", popular)):
        found = (ranking.topk(50).indices == last[:, None]).any(1).float().mean()
        print(f"{name}: Recall@50 {found:.3f} of the users' last items")
    best = scores[0].topk(10).indices.tolist()
    print("user 0 gets:", *(data.describe(item) for item in best), sep="\n  ")
