"""What the compilers make of the GPU kernels, counted without a GPU, and what the counts predict.

``python -m benchmarks.machine_code`` (`make tables`) compiles the kernels for GPUs and writes
Markdown tables for the Triton that is installed and for `nvcc`: registers, stack, shared memory,
spills, instructions per element, predicted times. `sass` reads machine code, `arithmetic` predicts.
"""
