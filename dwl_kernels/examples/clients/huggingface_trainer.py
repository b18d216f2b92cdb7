"""Hugging Face Trainer: a GPT-2 whose tokens are items, without the logits of a batch in memory.

``python -m dwl_kernels.examples.clients.huggingface_trainer``; needs ``pip install transformers
accelerate``. A checkpoint keeps temperature and counts; the item domains stand in its config.json.
"""

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions as Output

from dwl_kernels import CumulativeCrossEntropy


# swap: a name that ends so tells the Trainer to count the labels that are left after the shift
class ItemGPT2ForCausalLM(GPT2LMHeadModel):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.loss_fn = CumulativeCrossEntropy(
            item_domains=config.item_domains, learn_temperature=True, reduction="sum"
        )

    def forward(self, input_ids: Tensor, labels: Tensor | None = None,
                num_items_in_batch: Any = None, **options: Any) -> Output:  # fmt: skip
        if labels is None:
            return super().forward(input_ids, **options)
        states, target = self.transformer(input_ids, **options)[0][:, :-1], labels[:, 1:]
        loss = self.loss_fn(states, self.lm_head.weight, target)
        norm = (target != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return Output(loss=loss / norm)


class ItemTrainer(Trainer):
    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not name.endswith("temperature_logit")]


# end


def config(item_domains: list[int] | None) -> GPT2Config:
    return GPT2Config(
        vocab_size=1_000, n_positions=20, n_embd=32, n_layer=1, n_head=2, item_domains=item_domains,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    model = ItemGPT2ForCausalLM(config(item_domains=[item % 8 for item in range(1_000)]))
    rows = [{"input_ids": items, "labels": items} for items in torch.randint(1_000, (256, 20))]
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder, num_train_epochs=1, gradient_accumulation_steps=2, weight_decay=0.1,
            save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        ItemTrainer(model, options, train_dataset=rows).train()
        model.save_pretrained(folder)
        loss_fn = ItemGPT2ForCausalLM.from_pretrained(folder).loss_fn
    counts = loss_fn.domain_weights.interactions.sum()
    print(f"{int(counts)} steps counted, temperature {loss_fn.temperature:.3f}")


if __name__ == "__main__":
    main()
