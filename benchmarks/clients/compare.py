"""`python -m benchmarks.clients.compare EXAMPLE`, in the environment of a client: one line of JSON.

Loss and gradients of the example's swap are compared with those of the client's own loss on the
same batches, from the same weights and seeds. `benchmarks.clients` calls this and makes the table.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Figures = dict[str, Tensor]  # "loss", and a gradient by the name of its parameter
Pairs = Iterable[tuple[Figures, Figures]]  # of the client's own loss, and of the swap

BATCHES = 3
HSTU = os.environ.get("HSTU")  # a checkout of meta-recsys/generative-recommenders


def figures(model: nn.Module, loss: Callable[..., Any], *batch: Any, **named: Any) -> Figures:
    """The loss of a batch and the gradients of the model, by the same dropout for every caller."""
    torch.manual_seed(1)
    model.zero_grad()
    value = loss(*batch, **named)
    value = value if isinstance(value, Tensor) else value["loss"]
    value.backward()
    return {"loss": value.detach().clone()} | gradients(model)


def gradients(model: nn.Module) -> Figures:
    named = model.named_parameters()
    return {name: p.grad.detach().clone() for name, p in named if p.grad is not None}


def differences(pairs: Pairs) -> dict[str, float]:
    """The largest of all batches: of the loss to itself, of gradients to their largest entry."""
    loss, gradient = 0.0, 0.0
    for own, ours in pairs:
        missing = own.keys() - ours.keys()
        if missing:
            raise ValueError(f"the swap gives no gradient to {sorted(missing)}")
        loss = max(loss, float((ours["loss"] - own["loss"]).abs() / own["loss"].abs()))
        names = own.keys() - {"loss"}
        scale = max(float(own[name].abs().max()) for name in names)
        error = max(float((ours[name] - own[name]).abs().max()) for name in names)
        gradient = max(gradient, error / scale)
    return {"loss": loss, "gradient": gradient}


def same_weights(own: nn.Module, ours: nn.Module) -> None:
    ours.load_state_dict(own.state_dict(), strict=False)


def softmax(query: Tensor, positive: Tensor, negative: Tensor, hits: Tensor) -> Tensor:
    """The loss of every row by PyTorch, for clients that leave the loss to their users."""
    z = torch.cat([(query * positive).sum(1, keepdim=True), query @ negative.T], 1)
    z = z.masked_fill(F.pad(hits, (1, 0)), -torch.inf)
    return F.cross_entropy(z, torch.zeros(len(z), dtype=torch.long), reduction="none")


def lightning_domains() -> Pairs:
    from dwl_kernels.examples.clients import lightning_domains as example

    seen: list[Figures] = []

    class Recorded(example.TwoTower):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            seen.append({"loss": self.trainer.callback_metrics["loss"].clone()} | gradients(self))

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            loss = super().training_step(batch, index)
            self.log("loss", loss)
            return loss

    class Plain(Recorded):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            (user, item), weights = batch, self.loss_fn.domain_weights
            assert weights is not None
            assert self.loss_fn.item_domains is not None
            domains = self.loss_fn.item_domains[item, 0]
            weights.update(domains)
            query, items = self.users(user) / self.loss_fn.temperature, self.items(item)
            rows = softmax(query, items, items, item[:, None] == item)
            loss = (rows * weights()[domains]).mean()
            self.log("loss", loss)
            return loss

    torch.manual_seed(0)
    items = (torch.rand(768) ** 2 * example.ITEMS).long()
    clicks = torch.randint(example.USERS, (768,)), items
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*clicks), 256)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(1)
        example.trainer(2, folder).fit(Plain(), batches)
        torch.manual_seed(1)
        first = example.trainer(1, folder)  # of two epochs, the second from its checkpoint
        first.fit(Recorded(), batches)
        first.save_checkpoint(f"{folder}/first.ckpt")
        example.trainer(2, folder).fit(Recorded(), batches, ckpt_path=f"{folder}/first.ckpt")
    return zip(seen[:6], seen[6:], strict=True)


def recbole_sasrec() -> Pairs:
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender import SASRec

    from dwl_kernels.examples.clients import recbole_sasrec as example

    config = Config(model="SASRec", dataset="ml-100k", config_dict=example.OPTIONS)
    train, *_ = data_preparation(config, create_dataset(config))
    own, ours = (kind(config, train.dataset) for kind in (SASRec, example.FusedSASRec))
    same_weights(own, ours)
    for _, batch in zip(range(BATCHES), train, strict=False):
        yield figures(own, own.calculate_loss, batch), figures(ours, ours.calculate_loss, batch)


def rectools_sasrec() -> Pairs:
    from dwl_kernels.examples.clients import rectools_sasrec as example

    data, models = example.clicks(), []
    for options in {}, {"loss": "fused", "lightning_module_type": example.FusedModule}:
        model = example.build(**options)
        model._build_model_from_dataset(data)
        models.append(model)
    own, ours = (model.lightning_model for model in models)
    same_weights(own.torch_model, ours.torch_model)
    (group,) = ours.configure_optimizers().param_groups
    temperature = ours.torch_model.loss_fn.temperature_logit
    assert any(parameter is temperature for parameter in group["params"])
    batches = own.data_preparator.get_dataloader_train()
    for _, batch in zip(range(BATCHES), batches, strict=False):
        pair = (figures(m.torch_model, m.training_step, batch, 0) for m in (own, ours))
        yield next(pair), next(pair)


def replay_sasrec() -> Pairs:
    from replay.data.nn import TensorSchema
    from replay.nn.loss import CE, CESampled
    from replay.nn.sequential import SasRec

    from dwl_kernels.examples.clients import replay_sasrec as example

    torch.manual_seed(0)
    shapes = (50,), (64, 50), (64, example.LENGTH, 50)
    negatives = [torch.randint(example.ITEMS, shape) for shape in shapes]
    negatives[1][:, 40:] = -100
    model = SasRec.from_params(TensorSchema(example.ITEM), 32, 2, 1, example.LENGTH)
    fused = example.FusedCE(model), example.FusedCESampled(model)
    plain = CE(ignore_index=example.ITEMS), CESampled()
    for loss in plain:
        loss.logits_callback = model.get_logits
    for own, ours in zip(plain, fused, strict=True):
        for drawn in negatives:
            batch, pair = example.batch() | {"negative_labels": drawn}, []
            for model.loss in (own, ours):
                pair.append(figures(model, model, **batch))
            yield pair[0], pair[1]


def hstu_loss() -> Pairs:
    from dwl_kernels.examples.clients import hstu_loss as example

    torch.manual_seed(0)
    items, states = nn.Embedding(100, 32), nn.Parameter(torch.randn(16, 20, 32))
    model = nn.ParameterList([items.weight, states])
    sampler: nn.Module = example.UniformNegatives(items)
    own: Any = functools.partial(hstu_formula, num_to_sample=50, softmax_temperature=0.05)
    if HSTU:
        sys.path.insert(0, HSTU)
        import fbgemm_gpu  # noqa: F401  # the client uses its operators
        from generative_recommenders.research.modeling.sequential import autoregressive_losses
        from generative_recommenders.research.modeling.sequential.losses import sampled_softmax
        from generative_recommenders.research.rails.similarities import dot_product_similarity_fn

        scores = types.SimpleNamespace(
            similarity_fn=dot_product_similarity_fn.DotProductSimilarity()
        )
        own = sampled_softmax.SampledSoftmaxLoss(50, 0.05, scores)
        draw = autoregressive_losses.LocalNegativesSampler
        sampler = draw(100, items, list(range(100)), l2_norm=True, l2_norm_eps=1e-6)
    ours = example.SampledSoftmaxLoss(50, 0.05, None)
    for _ in range(BATCHES):
        ids, lengths = torch.randint(100, (16, 20)), torch.randint(21, (16,))
        weights = torch.rand(16, 20)

        def first(loss: Any, *rest: Any) -> Tensor:
            query = F.normalize(states, dim=-1)
            value: Tensor = loss(lengths, query, ids, items(ids), weights, sampler)[0]  # noqa: B023
            return value

        yield figures(model, first, own), figures(model, first, ours)


def hstu_formula(
    lengths: Tensor, query: Tensor, ids: Tensor, positive: Tensor, weights: Tensor, sampler: Any,
    *, num_to_sample: int, softmax_temperature: float,
) -> tuple[Tensor]:  # fmt: skip
    """The loss as its documentation says it, for where the client is not at hand."""
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    query, ids, positive, weights = query[real], ids[real], positive[real], weights[real]
    negative_ids, negative = sampler(ids, num_to_sample)
    candidates = torch.cat([sampler.normalize_embeddings(positive)[:, None], negative], 1)
    z = (candidates @ query[..., None])[..., 0] / softmax_temperature
    z = z.masked_fill(F.pad(negative_ids == ids[:, None], (1, 0)), -torch.inf)
    rows = F.cross_entropy(z, torch.zeros(len(z), dtype=torch.long), reduction="none")
    return ((rows * weights).sum() / weights.sum(),)


def sentence_transformers_ranking() -> Pairs:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from dwl_kernels.examples.clients import sentence_transformers_ranking as example

    torch.manual_seed(0)
    model = example.build()
    own, ours = MultipleNegativesRankingLoss(model), example.FusedRankingLoss(model)
    for columns in 2, 3:  # without hard negatives, and with
        for _ in range(BATCHES):
            texts = list(example.triplets(64).values())[:columns]
            batch = [model.preprocess(column) for column in texts], None
            yield figures(model, own, *batch), figures(model, ours, *batch)


def huggingface_trainer() -> Pairs:
    from transformers import GPT2LMHeadModel

    from dwl_kernels.examples.clients import huggingface_trainer as example

    torch.manual_seed(0)
    config = example.config(item_domains=None)
    own, ours = GPT2LMHeadModel(config), example.ItemGPT2ForCausalLM(config)
    same_weights(own, ours)
    for norm in None, torch.tensor(1_000), torch.tensor(500):
        items = torch.randint(1_000, (32, 20))
        padded = torch.arange(20) >= torch.randint(1, 21, (32, 1))
        batch = {"input_ids": items, "labels": items.masked_fill(padded, -100)}
        batch |= {} if norm is None else {"num_items_in_batch": norm}
        yield figures(own, own, **batch), figures(ours, ours, **batch)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        loaded = example.ItemGPT2ForCausalLM.from_pretrained(folder).train()
    yield figures(own, own, **batch), figures(loaded, loaded, **batch)


def torchrec_two_tower() -> Pairs:
    from dwl_kernels.examples.clients import torchrec_two_tower as example

    torch.manual_seed(0)
    model = example.TwoTower()

    def plain(features: Any) -> Tensor:
        query, positive, negative = (value.values() for value in model.tables(features).values())
        ids, negative_ids = features["item"].values(), features["other"].values()
        return softmax(query, positive, negative, ids[:, None] == negative_ids).mean()

    for _ in range(BATCHES):
        batch = example.batch()
        yield figures(model, plain, batch), figures(model, model, batch)


EXAMPLES: dict[str, Callable[[], Pairs]] = {
    compared.__name__: compared
    for compared in (
        lightning_domains,
        recbole_sasrec,
        rectools_sasrec,
        replay_sasrec,
        hstu_loss,
        sentence_transformers_ranking,
        huggingface_trainer,
        torchrec_two_tower,
    )
}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(json.dumps(differences(EXAMPLES[sys.argv[1]]())))
