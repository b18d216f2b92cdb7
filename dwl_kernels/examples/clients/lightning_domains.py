"""Lightning: domains, a learned temperature, a checkpoint, and a run that goes on from it.

``python -m dwl_kernels.examples.clients.lightning_domains``; needs ``pip install lightning``.
The loss is a module of the model, so its counts and temperature are in the checkpoint.
"""

import tempfile

import lightning
import torch
from torch import Tensor, nn

from dwl_kernels import DynamicWeightedSampledSoftmax

USERS, ITEMS, DOMAINS = 500, 2_000, 12


class TwoTower(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(USERS, 32), nn.Embedding(ITEMS, 32)
        # swap: the loss is a part of the model
        item_domains = torch.arange(ITEMS) * DOMAINS // ITEMS
        self.loss_fn = DynamicWeightedSampledSoftmax(
            item_domains=item_domains, temperature=4.0, learn_temperature=True
        )
        # end

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        user, item = batch
        # swap
        loss: Tensor = self.loss_fn(self.users(user), self.items(item), positive_ids=item)
        # end
        self.log("temperature", self.loss_fn.temperature)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # swap: weight decay would pull at the temperature
        whole = set(self.loss_fn.no_decay_parameters())
        decayed = [weight for weight in self.parameters() if weight not in whole]
        groups = {"params": decayed}, {"params": [*whole], "weight_decay": 0.0}
        # end
        return torch.optim.AdamW(groups)


def trainer(epochs: int, folder: str) -> lightning.Trainer:
    return lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    users, items = torch.randint(USERS, (10_240,)), (torch.rand(10_240) ** 2 * ITEMS).long()
    clicks = torch.utils.data.TensorDataset(users, items)
    batches = torch.utils.data.DataLoader(clicks, batch_size=256)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/first.ckpt"
        first = trainer(1, folder)
        first.fit(TwoTower(), batches)
        first.save_checkpoint(path)
        model = TwoTower()
        trainer(2, folder).fit(model, batches, ckpt_path=path)
    print(f"temperature {model.loss_fn.temperature:.2f}, {model.loss_fn.domain_weights}")


if __name__ == "__main__":
    main()
