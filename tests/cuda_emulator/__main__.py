"""Runs a module with the emulator installed, as the dry run of `benchmarks/gpu.sh` does.

With tests/ on PYTHONPATH: python -m cuda_emulator MODULE [ARGUMENT ...]
"""

from __future__ import annotations

import runpy
import sys

import cuda_emulator

if __name__ == "__main__":
    cuda_emulator.install()
    del sys.argv[0]  # the module's own name takes its place
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
