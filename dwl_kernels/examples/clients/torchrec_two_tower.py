"""TorchRec: two towers over one `EmbeddingCollection`, with negatives that the batch shares.

``python -m dwl_kernels.examples.clients.torchrec_two_tower``; needs ``pip install torchrec``.
A collection gives a `JaggedTensor` for each feature; the loss takes its ``.values()``.
"""

import torch
from torch import Tensor, nn
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor

from dwl_kernels import DynamicWeightedSampledSoftmax, UniformSampler

USERS, ITEMS = 500, 2_000
ROWS, NEGATIVES = 256, 1_024  # of a batch; TorchRec keeps features by row, four negatives each
TABLES = [
    EmbeddingConfig(USERS, 32, name="user_table", feature_names=["user"]),
    EmbeddingConfig(ITEMS, 32, name="item_table", feature_names=["item", "other"]),
]


class TwoTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = EmbeddingCollection(tables=TABLES)
        # swap
        self.loss_fn = DynamicWeightedSampledSoftmax()
        # end

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        embedded = self.tables(features)
        # swap
        query, positive, negative = (embedded[name].values() for name in ("user", "item", "other"))
        ids, negative_ids = (features[name].values() for name in ("item", "other"))
        loss = self.loss_fn(query, positive, negative, positive_ids=ids, negative_ids=negative_ids)
        # end
        return loss


def batch() -> KeyedJaggedTensor:
    negative_ids, _ = UniformSampler(ITEMS).sample(NEGATIVES)
    values = [torch.randint(USERS, (ROWS,)), torch.randint(ITEMS, (ROWS,)), negative_ids]
    lengths = torch.tensor([1, 1, NEGATIVES // ROWS]).repeat_interleave(ROWS)
    return KeyedJaggedTensor(["user", "item", "other"], torch.cat(values), lengths=lengths)


def main() -> None:
    torch.manual_seed(0)
    model = TwoTower()
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(5):
        loss = model(batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
