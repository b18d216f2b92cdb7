"""The CPU kernel of ``csrc/cpu/``: `solve` calls it, `build` compiles it on first use."""
