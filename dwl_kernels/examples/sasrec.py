"""A sequence model after SASRec, from ratings to ten recommendations.

``python -m dwl_kernels.examples.sasrec [--data path/to/ml-1m] [--epochs 5]``, a minute or two.
Every step predicts the item that follows, among all items (the cumulative cross-entropy).
"""

import torch
from torch import nn

from dwl_kernels import CumulativeCrossEntropy
from dwl_kernels.examples.data import from_command_line

data, epochs = from_command_line(__doc__, epochs=5)
torch.manual_seed(0)
LENGTH, PADDING = 50, data.num_items  # padding is one row more in the table, after the items
users = [user for user in range(data.num_users) if data.lengths[user] >= 3]
recent = [torch.from_numpy(data.sequence(user)[-LENGTH - 1 :]) for user in users]
sequences = nn.utils.rnn.pad_sequence(recent, batch_first=True, padding_value=PADDING)
rows, last = torch.arange(len(users)), (sequences != PADDING).sum(1) - 1
test = sequences[rows, last]  # the last item of each user is for testing
sequences[rows, last] = PADDING


class SASRec(nn.Module):
    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.items, self.places = nn.Embedding(PADDING + 1, dim), nn.Embedding(LENGTH, dim)
        for table in (self.items, self.places):
            nn.init.normal_(table.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(dim, 1, dim, 0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(dim), False)

    def forward(self, items: torch.Tensor) -> torch.Tensor:  # [B, L] -> [B, L, D]
        x = self.items(items) + self.places.weight[: items.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(items.shape[1])
        return self.encoder(8 * x, mask, is_causal=True)  # small tables, scaled up at the input


model, loss_fn = SASRec(), CumulativeCrossEntropy(ignore_index=PADDING)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
for epoch in range(epochs):
    model.train()
    for batch in torch.randperm(len(users)).split(64):
        inputs, targets = sequences[batch, :-1], sequences[batch, 1:]
        loss = loss_fn(model(inputs), model.items.weight[:-1], targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)

model.eval()
with torch.no_grad():  # serving: the state of the last step against all items but those taken
    states = torch.cat([model(part[:, :-1]) for part in sequences.split(256)])
    scores = states[rows, last - 1] @ model.items.weight[:-1].T
for row, user in enumerate(users):
    scores[row, data.sequence(user)[:-1]] = -torch.inf
best = scores.topk(10).indices
print(f"Recall@10 {(best == test[:, None]).any(1).float().mean():.3f} of the last items")
print("user 0 gets:", *(data.describe(item) for item in best[0].tolist()), sep="\n  ")
