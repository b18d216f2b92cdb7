"""sentence-transformers: `MultipleNegativesRankingLoss`, fused; ``temperature = 1 / scale``.

``python -m dwl_kernels.examples.clients.sentence_transformers_ranking``; needs ``pip install
"sentence-transformers[train]"``. In-batch negatives, and hard negatives where columns give them.
"""

import tempfile

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from dwl_kernels import DynamicWeightedSampledSoftmax

WORDS = [f"word{number}" for number in range(500)]


class FusedRankingLoss(MultipleNegativesRankingLoss):
    # swap
    def __init__(self, model: SentenceTransformer, scale: float = 20.0) -> None:
        super().__init__(model, scale)
        self.loss_fn = DynamicWeightedSampledSoftmax(
            normalize=True, temperature=1 / scale, in_batch=True
        )

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        query, positive, *hard = embeddings
        return self.loss_fn(query, positive, torch.cat(hard) if hard else None)

    # end


def build() -> SentenceTransformer:
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=32)], device="cpu")


def triplets(rows: int) -> dict[str, list[str]]:
    columns = torch.randint(len(WORDS), (3, rows, 6)).tolist()
    texts = [[" ".join(WORDS[word] for word in row) for row in column] for column in columns]
    return dict(zip(("anchor", "positive", "negative"), texts, strict=True))


def main() -> None:
    torch.manual_seed(0)
    model = build()
    with tempfile.TemporaryDirectory() as folder:
        options = SentenceTransformerTrainingArguments(
            folder, max_steps=20, per_device_train_batch_size=64, logging_steps=10, use_cpu=True,
            save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        data = Dataset.from_dict(triplets(1_280))
        SentenceTransformerTrainer(model, options, data, loss=FusedRankingLoss(model)).train()


if __name__ == "__main__":
    main()
