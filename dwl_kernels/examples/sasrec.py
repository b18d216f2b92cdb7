"""A sequence model after SASRec, from ratings to ten recommendations.

``python -m dwl_kernels.examples.sasrec [--data path/to/ml-1m] [--epochs 5]``, a minute or two.
Every step predicts the item that follows, among all items (the cumulative cross-entropy).

``torchrun --nproc-per-node 2 -m dwl_kernels.examples.sasrec`` splits the batch, the transformer
(FSDP2) and the rows of the item table over two processes. None holds the table while it trains.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dwl_kernels import CumulativeCrossEntropy
from dwl_kernels.examples.data import Interactions, from_command_line

LENGTH, PADDING = 50, -1


def split(data: Interactions) -> tuple[list[int], Tensor, Tensor]:
    """Users, the items of each but the last ``[U, L + 1]``, padded behind, and the last ``[U]``."""
    users = [user for user in range(data.num_users) if data.lengths[user] >= 3]
    recent = [torch.from_numpy(data.sequence(user)[-LENGTH - 1 :]) for user in users]
    sequences = nn.utils.rnn.pad_sequence(recent, batch_first=True, padding_value=PADDING)
    rows, last = torch.arange(len(users)), (sequences != PADDING).sum(1) - 1
    test = sequences[rows, last]  # for testing
    sequences[rows, last] = PADDING
    return users, sequences, test


class SASRec(nn.Module):
    def __init__(self, num_items: int, dim: int = 64, dropout: float = 0.1) -> None:
        super().__init__()
        self.items, self.places = nn.Embedding(num_items, dim), nn.Embedding(LENGTH, dim)
        for table in (self.items, self.places):
            nn.init.normal_(table.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(dim, 1, dim, dropout, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(dim), False)

    def forward(self, items: Tensor) -> Tensor:  # [B, L] -> [B, L, D]
        # Padding comes last, and no step before sees it: any item can stand for it.
        x = self.items(items.clamp(min=0)) + self.places.weight[: items.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(items.shape[1])
        return self.encoder(8 * x, mask, is_causal=True)  # small tables, scaled up at the input


def spread(model: SASRec) -> None:
    """Leave every process its rows of the item table and its part of all other parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    # A look-up sends ids to the rows and embeddings back, where FSDP would gather the table.
    lookup = RowwiseParallel(input_layouts=Shard(0), output_layouts=Shard(0))
    parallelize_module(model.items, mesh, lookup)
    # Gradients of a look-up are summed over the processes, and all others here are averages: the
    # embeddings stay what they are, and what goes back to the table is divided.
    model.items.register_forward_hook(lambda _, ids, x: x.detach() + (x - x.detach()) / ranks)
    for layer in model.encoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=set(model.items.parameters()))
    if dist.get_rank() == 0:
        parts = [p for p in model.parameters() if isinstance(p, DTensor)]
        kept, whole = sum(len(p.to_local().view(-1)) for p in parts), sum(p.numel() for p in parts)
        print(f"each of {ranks} processes keeps about {kept:,} of {whole:,} parameters", flush=True)


def train(model: SASRec, sequences: Tensor, epochs: int) -> None:
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    # Given a DTensor for a table, the loss finds its processes itself.
    loss_fn = CumulativeCrossEntropy(ignore_index=PADDING)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    order = torch.Generator().manual_seed(0)  # the same on all processes
    for epoch in range(epochs):
        model.train()
        users = torch.randperm(len(sequences), generator=order)
        own = users[: len(users) // ranks * ranks][rank::ranks]
        for batch in own.split(64 // ranks):
            loss = loss_fn(model(sequences[batch, :-1]), model.items.weight, sequences[batch, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)


def evaluate(model: SASRec, sequences: Tensor) -> Tensor:
    """Scores of all items after the last step of every user, ``[U, V]``, for serving."""
    model.eval()
    with torch.no_grad():  # all processes do the same
        last = (sequences != PADDING).sum(1) - 1
        states = torch.cat([model(part[:, :-1]) for part in sequences.split(256)])
        table: Any = model.items.weight
        if dist.is_initialized():
            table = table.full_tensor()  # small enough here
        return states[torch.arange(len(states)), last] @ table.T


def main() -> None:
    data, epochs = from_command_line(__doc__, epochs=5)
    torch.manual_seed(0)
    users, sequences, test = split(data)
    model = SASRec(data.num_items)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    if dist.is_initialized():
        spread(model)
        torch.manual_seed(1 + dist.get_rank())  # dropout
    train(model, sequences, epochs)
    scores = evaluate(model, sequences)
    if dist.is_initialized() and dist.get_rank() > 0:
        return  # the first process prints
    for row, user in enumerate(users):
        scores[row, data.sequence(user)[:-1]] = -torch.inf  # taken already
    best = scores.topk(10).indices
    print(f"Recall@10 {(best == test[:, None]).any(1).float().mean():.3f} of the last items")
    print("user 0 gets:", *(data.describe(item) for item in best[0].tolist()), sep="\n  ")


if __name__ == "__main__":
    main()
