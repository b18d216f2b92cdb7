"""A compiler that writes a few bytes, so that nothing but the cache takes part."""

from __future__ import annotations

from pathlib import Path

from dwl_kernels.backends import cache as _cache
from dwl_kernels.backends.cache import BuildError


class Compiler:
    """Counts what it compiles; `content` is what comes out."""

    def __init__(self, name: str = "gcc", content: bytes = b"a library") -> None:
        self.name, self.content, self.calls = name, content, 0

    def __call__(self, work: Path) -> Path:
        self.calls += 1
        (work / "library.so").write_bytes(self.content)
        return work / "library.so"

    def get(self) -> Path:
        return _cache.cached("cpu-key", ".so", lambda: self.name, self, "a kernel")


def without_compiler() -> Path:
    def missing() -> str:
        raise BuildError("no compiler found")

    return _cache.cached("cpu-key", ".so", missing, Compiler(), "a kernel")
