"""What compilers made of the GPU kernels, kept while the sources and the compiler stay the same.

Compiling takes minutes, and kernels change more rarely than tests run. Where the file in
`data/machine_code/` is of other sources or of another compiler, the tests compile; `make tables`
writes it anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dwl_kernels.backends.cache import digest

ROOT = Path(__file__).resolve().parent.parent
KEPT = Path(__file__).parent / "data" / "machine_code"
COUNTS = "benchmarks/machine_code/*.py"
TRITON = ("dwl_kernels/backends/triton/**/*.py", "dwl_kernels/core/*.py", COUNTS)
CUDA = ("csrc/cuda/*", "dwl_kernels/backends/cuda/*.py", COUNTS)


def found(
    name: str,  # of the file
    sources: Iterable[str],  # patterns, from the root
    compiler: str,  # its version, and all that it is asked
    compile_and_count: Callable[[], Any],
) -> Any:
    """What `compile_and_count` gives, as it comes from JSON."""
    files = sorted({file for pattern in sources for file in ROOT.glob(pattern) if file.is_file()})
    contents = [part for file in files for part in (str(file.relative_to(ROOT)), file.read_bytes())]
    of, path = digest(compiler, *contents), KEPT / f"{name}.json"
    with contextlib.suppress(OSError, ValueError, LookupError):  # not there, or damaged
        kept = json.loads(path.read_text())
        if kept["of"] == of:
            return kept["found"]
    result = json.loads(json.dumps(compile_and_count()))
    if os.environ.get("DWL_KERNELS_KEEP") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"of": of, "found": result}, indent=1) + "\n")
    return result


def by_triton(name: str, script: str) -> Any:
    """What a script writes to the file that it is given; in a process without the interpreter."""
    import triton

    def run() -> Any:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = str(ROOT)
        with tempfile.TemporaryDirectory() as folder:
            program, result = Path(folder) / "forms.py", Path(folder) / "found.json"
            program.write_text(script)
            command = [sys.executable, str(program), str(result)]
            subprocess.run(command, check=True, env=environment)
            return json.loads(result.read_text())

    return found(name, TRITON, triton.__version__ + script, run)
