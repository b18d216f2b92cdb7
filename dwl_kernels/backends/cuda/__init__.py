"""The CUDA kernel of ``csrc/cuda/``: `solve` calls it, `build` compiles the `variants` of it."""
