"""`python -m benchmarks.speed.one SHAPE [BACKEND]`: three steps of one shape, for a profiler."""

from __future__ import annotations

import sys

import torch

from benchmarks.speed.baselines import package_loss, step
from benchmarks.speed.shapes import GPU, random_inputs


def main(name: str, backend: str = "triton") -> None:
    (shape,) = (s for s in GPU if s.name == name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        shape = shape.shrunk(48, 40, 97, dim=16)
    inputs = random_inputs(shape, "plain", device=device)
    for _ in range(3):
        gradients = step(lambda x: package_loss(x, backend))(inputs)
    assert isinstance(gradients, tuple)
    finite = all(bool(g.isfinite().all()) for g in gradients if g is not None)
    print(f"{shape}: {'finite' if finite else 'NOT FINITE'}")
    sys.exit(not finite)


if __name__ == "__main__":
    main(*sys.argv[1:])
