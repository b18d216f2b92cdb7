"""Benchmarks of speed and of recommendation quality."""
