"""Benchmarks of speed and of recommendation quality."""

import dwl_kernels as dwl_kernels  # here, so that Ctrl-C ends every command in one line
