"""RePlay: SASRec with the fused losses, by RePlay's protocol of losses.

``python -m dwl_kernels.examples.clients.replay_sasrec``; needs ``pip install "replay-rec[torch]"``.
`FusedCE` takes the place of RePlay's ``CE``, `FusedCESampled` that of its ``CESampled``.
"""

from typing import Any

import lightning
import torch
from replay.data import FeatureHint, FeatureType
from replay.data.nn import TensorFeatureInfo, TensorSchema
from replay.nn.lightning import LightningModule
from replay.nn.sequential import SasRec
from torch import Tensor, nn

from dwl_kernels import CumulativeCrossEntropy, DynamicWeightedSampledSoftmax

ITEMS, LENGTH = 1_000, 20
ITEM = TensorFeatureInfo(
    "item_id", FeatureType.CATEGORICAL, is_seq=True, feature_hint=FeatureHint.ITEM_ID,
    cardinality=ITEMS, padding_value=ITEMS, embedding_dim=32,
)  # fmt: skip


# swap
class FusedCE(nn.Module):
    def __init__(self, model: SasRec) -> None:
        super().__init__()
        self.item_weights = model.body.embedder.get_item_weights
        self.loss_fn = CumulativeCrossEntropy()

    def forward(self, *, model_embeddings: Tensor, positive_labels: Tensor,
                target_padding_mask: Tensor, **_: Any) -> Tensor:  # fmt: skip
        target = positive_labels.masked_fill(~target_padding_mask, self.loss_fn.ignore_index)
        return self.loss_fn(model_embeddings, self.item_weights(), target[..., 0])


# end


class FusedCESampled(nn.Module):
    def __init__(self, model: SasRec) -> None:
        super().__init__()
        self.item_weights = model.body.embedder.get_item_weights
        self.loss_fn = DynamicWeightedSampledSoftmax()

    def forward(self, *, model_embeddings: Tensor, positive_labels: Tensor, negative_labels: Tensor,
                target_padding_mask: Tensor, **_: Any) -> Tensor:  # fmt: skip
        if negative_labels.dim() == 2:  # of every sequence
            negative_labels = negative_labels[:, None].expand(-1, positive_labels.shape[1], -1)
        return self.loss_fn(
            model_embeddings, table=self.item_weights(), positive_ids=positive_labels[..., 0],
            negative_ids=negative_labels.masked_fill(negative_labels == -100, -1),
            example_weights=target_padding_mask[..., 0].float(),
        )  # fmt: skip


def batch() -> dict[str, Any]:
    items = torch.randint(ITEMS, (64, LENGTH + 1))
    padded = torch.arange(LENGTH) < torch.randint(LENGTH - 1, (64, 1))  # on the left
    return {
        "feature_tensors": {"item_id": items[:, :-1].masked_fill(padded, ITEMS)},
        "padding_mask": ~padded,
        "positive_labels": items[:, 1:, None].masked_fill(padded[..., None], ITEMS),
        "negative_labels": torch.randint(ITEMS, (64, 50)),
        "target_padding_mask": ~padded[..., None],
    }


def main() -> None:
    torch.manual_seed(0)
    batches: Any = [batch() for _ in range(10)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    for loss in FusedCE, FusedCESampled:
        model = SasRec.from_params(TensorSchema(ITEM), 32, 2, 1, LENGTH)
        # swap
        model.loss = loss(model)
        # end
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_checkpointing=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(LightningModule(model), loader)
        print(f"{loss.__name__}: {trainer.callback_metrics['train_loss']:.3f}")


if __name__ == "__main__":
    main()
