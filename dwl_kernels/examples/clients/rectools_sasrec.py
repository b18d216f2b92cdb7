"""RecTools: SASRecModel with the fused cross-entropy and a learned temperature.

``python -m dwl_kernels.examples.clients.rectools_sasrec``; needs ``pip install "rectools[torch]"``.
RecTools' optimiser takes the parameters of the torch model and no others, so the loss is put there.
"""

from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from rectools.models.nn.transformers.lightning import TransformerLightningModule
from torch import Tensor

from dwl_kernels import CumulativeCrossEntropy


class FusedModule(TransformerLightningModule):
    # swap: item 0 is the padding
    def __init__(self, torch_model: Any, **options: Any) -> None:
        super().__init__(torch_model, **options)
        torch_model.loss_fn = CumulativeCrossEntropy(learn_temperature=True, ignore_index=0)

    def _calc_custom_loss(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        table = self.torch_model.item_model.get_all_embeddings()
        states = self.torch_model.encode_sessions(batch, table)
        states = states[:, -batch["y"].shape[1] :]  # a validation has the last step alone
        return self.torch_model.loss_fn(states, table, batch["y"], example_weights=batch["yw"])

    def _calc_custom_loss_outputs(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return {"loss": self._calc_custom_loss(batch, batch_idx)}

    # end


def build(**options: Any) -> SASRecModel:
    return SASRecModel(
        n_factors=32, n_blocks=1, n_heads=2, session_max_len=20, batch_size=64,
        get_trainer_func=lambda: pytorch_lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        ), **options,
    )  # fmt: skip


def clicks() -> Dataset:
    random, size = np.random.default_rng(0), 4_000
    return Dataset.construct(
        pd.DataFrame({
            "user_id": random.integers(200, size=size), "item_id": random.integers(500, size=size),
            "weight": 1.0, "datetime": pd.date_range("2026-01-01", periods=size, freq="min"),
        })
    )  # fmt: skip


def main() -> None:
    data = clicks()
    # swap
    model = build(loss="fused", lightning_module_type=FusedModule)
    # end
    model.fit(data)
    print(model.recommend([0, 1], data, k=3, filter_viewed=True))
    print("temperature", model.torch_model.loss_fn.temperature.item())


if __name__ == "__main__":
    main()
