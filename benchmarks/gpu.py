"""Speed of the Triton kernel on a GPU: every shape against its bound and the baselines.

``python -m benchmarks.gpu OUT`` writes ``OUT/speed-gpu.json`` and ``OUT/speed-gpu.png``. With
``--dry`` it runs tiny sizes on a CPU, through Triton's interpreter, to try the script itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import dwl_kernels
from dwl_kernels import backends

# rows, candidates (0: in-batch), D, ids given
SHAPES = {
    "small": (512, 0, 64, False),
    "two-tower": (8192, 0, 128, True),
    "sequence": (65536, 8192, 128, False),
    "wide": (16384, 16384, 256, False),
}
DRY = {name: (48, 0 if n == 0 else 40, 16, ids) for name, (_, n, _, ids) in SHAPES.items()}
LEVELS = ("plain", "log-Q", "hits", "domain weights")
TEMPERATURE = 0.05

Inputs = dict[str, Any]


def inputs_of(shape: tuple[int, int, int, bool], level: str, device: str, seed: int) -> Inputs:
    """Unit vectors; each level switches on one thing more."""
    rows, candidates, dim, _ = shape
    generator = torch.Generator(device=device).manual_seed(seed)
    dtype = torch.bfloat16

    def unit(n: int) -> torch.Tensor:
        x = torch.randn(n, dim, generator=generator, device=device)
        return F.normalize(x, dim=1).to(dtype).requires_grad_()

    def ids(n: int) -> torch.Tensor:
        return torch.randint(0, 100_000, (n,), generator=generator, device=device)

    def log_q(n: int) -> torch.Tensor:
        return -10 * torch.rand(n, generator=generator, device=device)

    inputs: Inputs = {"query": unit(rows), "positive": unit(rows)}
    prefix = "positive_" if candidates else ""
    if candidates:
        inputs["negative"] = unit(candidates)
    on = LEVELS.index(level)
    for active, name, make in ((on >= 1, "log_q", log_q), (on >= 2, "ids", ids)):
        if active:
            inputs[prefix + name] = make(rows)
            if candidates:
                inputs["negative_" + name] = make(candidates)
    if on >= 3:
        inputs["domain_ids"] = torch.randint(0, 20, (rows,), generator=generator, device=device)
        inputs["domain_weights"] = torch.rand(20, generator=generator, device=device) + 0.5
    return inputs


def package(backend: backends.Backend) -> Callable[[Inputs], torch.Tensor]:
    def loss(inputs: Inputs) -> torch.Tensor:
        shared = "negative" in inputs
        function = dwl_kernels.sampled_softmax_loss if shared else dwl_kernels.in_batch_softmax_loss
        return function(**inputs, temperature=TEMPERATURE, backend=backend)

    return loss


def eager(inputs: Inputs) -> torch.Tensor:
    """What most people write: concatenate, mask, `cross_entropy`, multiply by the weight."""
    query, positive = inputs["query"], inputs["positive"]
    rows = len(query)
    if "negative" in inputs:
        own = (query * positive).sum(1, keepdim=True)
        z = torch.cat((own, query @ inputs["negative"].T), 1).float() / TEMPERATURE
        target = torch.zeros(rows, dtype=torch.int64, device=z.device)
        if "positive_log_q" in inputs:
            log_q = inputs["negative_log_q"].expand(rows, -1)
            z = z - torch.cat((inputs["positive_log_q"][:, None], log_q), 1)
        if "positive_ids" in inputs:
            hit = inputs["positive_ids"][:, None] == inputs["negative_ids"]
            z = z.masked_fill(F.pad(hit, (1, 0)), -torch.inf)
    else:
        z = (query @ positive.T).float() / TEMPERATURE
        target = torch.arange(rows, device=z.device)
        if "log_q" in inputs:
            z = z - inputs["log_q"]
        if "ids" in inputs:
            hit = (inputs["ids"][:, None] == inputs["ids"]).fill_diagonal_(False)
            z = z.masked_fill(hit, -torch.inf)
    loss = F.cross_entropy(z, target, reduction="none")
    if "domain_ids" in inputs:
        loss = loss * inputs["domain_weights"][inputs["domain_ids"]]
    return loss.mean()


def bound(shape: tuple[int, int, int, bool], device: str) -> Callable[[Inputs], None]:
    """The three products that any implementation must do, 6 B N D operations."""
    rows, candidates, dim, _ = shape
    n = candidates or rows
    z = torch.randn(rows, n, device=device).to(torch.bfloat16)
    d_query = torch.empty(rows, dim, device=device, dtype=torch.bfloat16)
    d_candidates = torch.empty(n, dim, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(z)

    def run(inputs: Inputs) -> None:
        query = inputs["query"].detach()
        c = inputs["negative" if "negative" in inputs else "positive"].detach()
        torch.mm(query, c.T, out=out)
        torch.mm(z, c, out=d_query)
        torch.mm(z.T, query, out=d_candidates)

    return run


def step(loss: Callable[[Inputs], torch.Tensor]) -> Callable[[Inputs], None]:
    def run(inputs: Inputs) -> None:
        leaves = [inputs[k] for k in ("query", "positive", "negative") if k in inputs]
        torch.autograd.grad(loss(inputs), leaves)

    return run


def milliseconds(run: Callable[[Inputs], None], inputs: list[Inputs], runs: int) -> dict[str, Any]:
    """Device time (on a CPU: wall time) and host time of `runs` calls, the inputs in turn."""
    device = inputs[0]["query"].device.type
    for k in range(3 if device == "cuda" else 1):
        run(inputs[k % len(inputs)])
    times, host = [], []
    for k in range(runs):
        if device == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            before = time.perf_counter()
            run(inputs[k % len(inputs)])
            host.append(1e3 * (time.perf_counter() - before))
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop))
        else:
            before = time.perf_counter()
            run(inputs[k % len(inputs)])
            times.append(1e3 * (time.perf_counter() - before))
            host.append(times[-1])
    low, median, high = statistics.quantiles(times, n=4) if runs > 1 else times * 3
    return {"median": median, "low": low, "high": high, "host": statistics.median(host)}


def peak_bytes(run: Callable[[Inputs], None], inputs: Inputs) -> int | None:
    if not inputs["query"].is_cuda:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(device: str, runs: int, dry: bool) -> list[dict[str, Any]]:
    table = []
    versions = {
        "eager": step(eager),
        "chunked": step(package("chunked")),
        "triton": step(package("triton")),
    }
    if not dry:
        versions["torch.compile"] = step(torch.compile(eager))
    for name, shape in (DRY if dry else SHAPES).items():
        top = [inputs_of(shape, LEVELS[-1], device, seed) for seed in range(3)]
        steps = {"bound": bound(shape, device), **versions}
        for version, run in steps.items():
            row = {"shape": name, "version": version, "level": LEVELS[-1]}
            table.append({**row, **milliseconds(run, top, runs), "peak": peak_bytes(run, top[0])})
        for level in LEVELS[:-1]:
            inputs = [inputs_of(shape, level, device, seed) for seed in range(3)]
            row = {"shape": name, "version": "triton", "level": level}
            table.append({**row, **milliseconds(versions["triton"], inputs, runs), "peak": None})
        if name == "sequence":
            weights = torch.ones(shape[0], device=device)
            weights[::2] = 0
            for padded in top:
                padded["example_weights"] = weights
            row = {"shape": name, "version": "triton", "level": "half padded"}
            table.append({**row, **milliseconds(versions["triton"], top, runs), "peak": None})
        for row in table:
            if row["shape"] == name:
                print(f"{name:10s} {row['version']:14s} {row['level']:15s} {row['median']:9.3f} ms")
    return table


def plot(table: list[dict[str, Any]], machine: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in table if r["level"] == LEVELS[-1]]
    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    figure, axes = plt.subplots(1, len(shapes), figsize=(3.2 * len(shapes), 3), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        mine = [r for r in rows if r["shape"] == shape]
        axis.bar([r["version"] for r in mine], [r["median"] for r in mine])
        axis.set_yscale("log")
        axis.set_title(shape)
        axis.set_ylabel("ms, forward and backward")
        axis.tick_params(axis="x", rotation=60)
    figure.suptitle(f"{machine}, bfloat16, log-Q, hits and domain weights on")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--runs", type=int, default=50)
    arguments = parser.parse_args()
    device = "cpu" if arguments.dry else "cuda"
    table = measure(device, 2 if arguments.dry else arguments.runs, arguments.dry)
    arguments.out.mkdir(parents=True, exist_ok=True)
    machine = "a CPU, dry run" if arguments.dry else torch.cuda.get_device_name()
    import triton

    record = {
        "machine": machine,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": os.environ.get("COMMIT", "unknown"),
        "dtype": "bfloat16",
        "shapes": DRY if arguments.dry else SHAPES,
        "runs": arguments.runs,
        "rows": table,
    }
    (arguments.out / "speed-gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(table, machine, arguments.out / "speed-gpu.png")


if __name__ == "__main__":
    main()
