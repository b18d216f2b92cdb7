"""HSTU: `SampledSoftmaxLoss` of meta-recsys/generative-recommenders, by its signature.

``python -m dwl_kernels.examples.clients.hstu_loss``; needs nothing more. Import this class in
place of the other in its trainer. The similarity of the model is to be the dot product.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dwl_kernels import DynamicWeightedSampledSoftmax


# swap
class SampledSoftmaxLoss(nn.Module):
    def __init__(self, num_to_sample: int, softmax_temperature: float, *_: Any, **__: Any) -> None:
        super().__init__()
        self.num_to_sample = num_to_sample
        self.loss_fn = DynamicWeightedSampledSoftmax(
            temperature=softmax_temperature, reduction="weighted_mean"
        )

    def jagged_forward(
        self, output_embeddings: Tensor, supervision_ids: Tensor, supervision_embeddings: Tensor,
        supervision_weights: Tensor, negatives_sampler: Any, **_: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        ids, negative = negatives_sampler(supervision_ids, self.num_to_sample)  # [T, K], [T, K, D]
        positive = negatives_sampler.normalize_embeddings(supervision_embeddings)
        table = torch.cat([positive, negative.flatten(0, 1)])  # rows of this batch, each once
        own, drawn = torch.arange(len(table), device=ids.device).split([len(ids), ids.numel()])
        drawn = drawn.view_as(ids).masked_fill(ids == supervision_ids[:, None], -1)
        loss = self.loss_fn(output_embeddings, table=table, positive_ids=own, negative_ids=drawn,
                            example_weights=supervision_weights)  # fmt: skip
        return loss, {}

    def forward(
        self, lengths: Tensor, output_embeddings: Tensor, supervision_ids: Tensor,
        supervision_embeddings: Tensor, supervision_weights: Tensor, negatives_sampler: Any,
        **_: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        real = torch.arange(supervision_ids.shape[1], device=lengths.device) < lengths[:, None]
        return self.jagged_forward(
            output_embeddings[real], supervision_ids[real], supervision_embeddings[real],
            supervision_weights[real], negatives_sampler,
        )  # fmt: skip


# end


class UniformNegatives(nn.Module):
    """Stands in for the client's `LocalNegativesSampler`."""

    def __init__(self, items: nn.Embedding) -> None:
        super().__init__()
        self.items = items

    def normalize_embeddings(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1)

    def forward(self, positive_ids: Tensor, num_to_sample: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(self.items.num_embeddings, (*positive_ids.shape, num_to_sample))
        return ids, self.normalize_embeddings(self.items(ids))


def main() -> None:
    torch.manual_seed(0)
    items, states = nn.Embedding(1_000, 32), torch.randn(16, 20, 32, requires_grad=True)
    ids, lengths = torch.randint(1_000, (16, 20)), torch.randint(1, 21, (16,))
    loss_fn = SampledSoftmaxLoss(num_to_sample=128, softmax_temperature=0.05)
    loss, _ = loss_fn(lengths, nn.functional.normalize(states, dim=-1), ids, items(ids),
                      torch.ones(16, 20), UniformNegatives(items))  # fmt: skip
    loss.backward()
    print(f"loss {loss.item():.3f} over {int(lengths.sum())} steps")


if __name__ == "__main__":
    main()
