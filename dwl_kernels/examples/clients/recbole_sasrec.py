"""RecBole: SASRec with the fused cross-entropy, on the ml-100k sample that comes with RecBole.

``python -m dwl_kernels.examples.clients.recbole_sasrec``; needs ``pip install recbole "pandas<3"``.
"""

from typing import Any

from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed
from torch import Tensor

from dwl_kernels import CumulativeCrossEntropy

OPTIONS = {
    "loss_type": "CE", "train_neg_sample_args": None, "MAX_ITEM_LIST_LENGTH": 20,
    "hidden_size": 32, "inner_size": 32, "epochs": 1, "use_gpu": False, "show_progress": False,
    "save_dataset": False, "enable_scatter_plot": False, "state": "WARNING",
}  # fmt: skip


class FusedSASRec(SASRec):
    # swap
    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.loss_fct = CumulativeCrossEntropy()

    def calculate_loss(self, interaction: Any) -> Tensor:
        states = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        return self.loss_fct(states, self.item_embedding.weight, interaction[self.POS_ITEM_ID])

    # end


def main() -> None:
    config = Config(model="SASRec", dataset="ml-100k", config_dict=OPTIONS)
    init_seed(config["seed"], config["reproducibility"])
    train, validation, _ = data_preparation(config, dataset := create_dataset(config))
    model = FusedSASRec(config, train.dataset)
    _, metrics = Trainer(config, model).fit(train, validation, saved=False)
    print(f"{dataset.item_num - 1} items, {dict(metrics)}")


if __name__ == "__main__":
    main()
