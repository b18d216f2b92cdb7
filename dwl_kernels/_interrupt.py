"""Ctrl-C ends a command with one line and status 130, as a shell counts it, and no traceback.

Importing this does it where `python -m` runs a module of the package or of its benchmarks, from
before torch is imported, which takes seconds. Elsewhere it does nothing.
"""

from __future__ import annotations

import sys
from types import TracebackType

_PACKAGES = ("dwl_kernels", "benchmarks")


def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    print("\ninterrupted" if sys.stderr.isatty() else "interrupted", file=sys.stderr)
    sys.exit(130)


# `python -m` has "-m" for the script's name while it imports the packages of the module.
if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].partition(".")[0] in _PACKAGES:
    sys.excepthook = hook
