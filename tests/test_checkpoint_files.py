"""Checkpoints that earlier versions wrote are loaded, and training goes on from them.

`data/checkpoint-N.pt` hold a state and what the version that wrote it found in the steps after it.
`PYTHONPATH=. python tests/test_checkpoint_files.py N` writes the next one, whenever a `_version`
moves; those that are there are never written again.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from dwl_kernels import (
    CountMinSketch,
    CumulativeCrossEntropy,
    DomainWeights,
    DualScaleSampledSoftmax,
    DynamicWeightedSampledSoftmax,
    StreamingFrequency,
    UnigramSampler,
)

DATA = Path(__file__).parent / "data"
FILES = sorted(DATA.glob("checkpoint-*.pt"))
ITEMS, DIM, ROWS = 12, 3, 4
ITEM_DOMAINS = torch.tensor([0] * 7 + [1] * 4 + [2])
BEFORE, AFTER = 5, 4  # steps before and after the state; weights ramp up from step 2 to 8


def model_of_files() -> nn.ModuleDict:
    """All that keeps a state. A later version may add parts, but none that a file lacks."""
    # With this momentum the average goes a third of its way in a step.
    weights = DomainWeights(3, momentum=1e-45, weight_range=(1.0, 5.0), start=2, full=8)
    parts: dict[str, nn.Module] = {
        "table": nn.Embedding(ITEMS, DIM, dtype=torch.float64),
        "sampled": DynamicWeightedSampledSoftmax(
            weights=weights,
            item_domains=ITEM_DOMAINS,
            calibration=0.5,
            temperature=0.3,
            learn_temperature=True,
            backend="eager",
        ),
        "dual": DualScaleSampledSoftmax(
            hardness=0.5, similarity=1.0, learn_temperature=True, backend="eager"
        ),
        "constant": CumulativeCrossEntropy(
            weights=[0.5, 1.0, 3.0], item_domains=ITEM_DOMAINS, backend="eager"
        ),
        "measured": DomainWeights.from_interactions(
            [0, 0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 0, 0, 1, 2]
        ),
        "frequency": StreamingFrequency(8, num_hashes=2, seed=3),
        "sketch": CountMinSketch(8, 2, seed=-5),
        "sampler": UnigramSampler(torch.arange(1, ITEMS + 1)),
    }
    model = nn.ModuleDict(parts)
    places = torch.arange(ITEMS * DIM, dtype=torch.float64).reshape(ITEMS, DIM)
    model["table"].weight.data.copy_((places * 1.7).sin())
    return model


def step_of_files(model: nn.ModuleDict, step: int) -> Tensor:
    """A step of training, of which everything that is counted or learned is a part."""
    rows = torch.arange(ROWS)
    positive, negative = (rows * 5 + step) % ITEMS, (torch.arange(6) * 7 + step * step) % ITEMS
    table: Tensor = model["table"].weight
    query = table[(rows + step) % ITEMS]
    for name in ("measured", "frequency", "sketch"):
        model[name].update(ITEM_DOMAINS[positive] if name == "measured" else positive)
    log_q = model["sketch"].log_q(positive), model["frequency"].log_q(positive)
    losses = [
        model["sampled"](
            *(query, table[positive], table[negative]),
            positive_ids=positive,
            negative_ids=negative,
            positive_log_q=log_q[0].double(),
            negative_log_q=model["sampler"].log_q(negative).double(),
        ),
        model["dual"](
            *(query, table[positive]), positive_ids=positive, positive_log_q=log_q[1].double()
        ),
        model["constant"](query, table, positive),
    ]
    model.zero_grad()
    sum(losses).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.05 * parameter.grad
    found = [torch.stack([loss.detach() for loss in losses])]
    found += [model[name].temperature.detach().reshape(1) for name in ("sampled", "dual")]
    found += [model["sampled"].domain_weights(), model["measured"](), *log_q]
    return torch.cat([one.double() for one in found])


def write(path: Path) -> None:
    if path.exists():
        raise SystemExit(f"{path} is there and stays as it is; give the next number")
    model = model_of_files()
    for step in range(BEFORE):
        step_of_files(model, step)
    state = copy.deepcopy(model.state_dict())
    results = torch.stack([step_of_files(model, BEFORE + step) for step in range(AFTER)])
    torch.save({"state": state, "results": results}, path)


# ---------------------------------------------------------------- files of earlier versions


def assigned(model: nn.ModuleDict, state: Any, _: Path) -> Any:
    return model.load_state_dict(state, assign=True)


def without_metadata(model: nn.ModuleDict, state: Any, _: Path) -> Any:
    """As safetensors and whoever makes a dict of its own hand it on."""
    return model.load_state_dict(dict(state))


def part_of_a_model(model: nn.ModuleDict, state: Any, _: Path) -> Any:
    saved = nn.ModuleDict({"loss": model_of_files()})
    saved["loss"].load_state_dict(state)
    return nn.ModuleDict({"loss": model}).load_state_dict(saved.state_dict())


def distributed(model: nn.ModuleDict, state: Any, folder: Path) -> Any:
    dcp.save(dict(state), checkpoint_id=folder, no_dist=True)
    found = get_model_state_dict(model)
    dcp.load(found, checkpoint_id=folder, no_dist=True)
    return set_model_state_dict(model, found)


LOADS: dict[str, Callable[[nn.ModuleDict, Any, Path], Any]] = {
    "strict": lambda model, state, _: model.load_state_dict(state),
    "not strict": lambda model, state, _: model.load_state_dict(state, strict=False),
    "assigned": assigned,
    "without metadata": without_metadata,
    "part of a model": part_of_a_model,
    "distributed": distributed,
}


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_training_goes_on_from_a_file_as_it_did(path: Path, load: str, tmp_path: Path) -> None:
    """The same state, and then the same losses, weights, schedule, temperatures and log-Q."""
    file, model = read(path), model_of_files()
    keys = LOADS[load](model, copy.deepcopy(file["state"]), tmp_path)
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    own = model.state_dict()
    for key, value in file["state"].items():
        assert torch.equal(own[key], value), key
    for step, wanted in enumerate(file["results"]):
        torch.testing.assert_close(
            step_of_files(model, BEFORE + step), wanted, rtol=2e-6, atol=1e-6
        )


def test_every_version_of_today_has_a_file() -> None:
    written: dict[str, set[int]] = {}
    for path in FILES:
        for name, metadata in read(path)["state"]._metadata.items():
            written.setdefault(name, set()).add(metadata["version"])
    for name, part in model_of_files().named_modules():
        assert part._version in written[name], f"{name}: run {Path(__file__).name} and commit it"


def test_state_may_go_into_safetensors() -> None:
    """Which takes no two tensors of one memory, none with gaps, and no objects."""
    state = model_of_files().state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    assert all(value.is_contiguous() for value in state.values())
    memory = [value.untyped_storage().data_ptr() for value in state.values()]
    assert len({*memory}) == len(memory)


# ---------------------------------------------------------------- versions

STATEFUL = [
    "sampled",
    "sampled.domain_weights",
    "dual",
    "constant",
    "measured",
    "frequency",
    "sketch",
]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", STATEFUL)
def test_newer_version_is_refused_by_name(name: str, strict: bool) -> None:
    model = model_of_files()
    before, state = copy.deepcopy(model.state_dict()), model.state_dict()
    for key, value in state.items():
        state[key] = value + 1
    state._metadata[name]["version"] += 1
    with pytest.raises(RuntimeError, match=rf"{name}: .* newer version of dwl_kernels.*; update"):
        model.load_state_dict(state, strict=strict)
    for key, value in before.items():
        if key.rpartition(".")[0] == name:
            assert torch.equal(model.state_dict()[key], value), key


def test_newer_names_without_metadata_are_unexpected_keys() -> None:
    model = model_of_files()
    state = dict(model.state_dict()) | {"sketch.of_a_later_version": torch.ones(1)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*sketch\.of_a_later_version"):
        model.load_state_dict(state)


def test_what_early_versions_lacked_is_filled_in_for_them_alone() -> None:
    lacking = ["sampled.domain_weights.steps", "sampled.domain_weights.arguments"]
    for metadata, filled in ((None, True), ({"version": 1}, True), ({"version": 2}, False)):
        model = model_of_files()
        state = copy.deepcopy(model.state_dict())
        model["sampled"].domain_weights.steps += 3
        for key in lacking:
            del state[key]
        if metadata is None:
            state = dict(state)
        else:
            state._metadata["sampled.domain_weights"] = metadata
        missing = model.load_state_dict(state, strict=False).missing_keys
        assert missing == ([] if filled else lacking)
        assert model["sampled"].domain_weights.steps == (0 if filled else 3)


if __name__ == "__main__":
    write(DATA / f"checkpoint-{int(sys.argv[1])}.pt")
