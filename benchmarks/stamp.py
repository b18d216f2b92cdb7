"""What a table of machine code was compiled from, as one number.

A table carries the stamp of its sources, and a test compares it with that of the tree: a kernel
that changed without its table is found without compiling anything. Comments, docstrings and
formatting do not count. In Python neither do functions that Triton does not compile: what the host
decides comes in as values.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Of C++: comments, literals, the end of a directive, names and numbers, all other signs.
_TOKEN = re.compile(
    r"""//[^\n]* | /\*.*?\*/ | "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*' | \n | [\w.][\w.']* | \S""",
    re.VERBOSE | re.DOTALL,
)


def stamp(files: Iterable[Path], *decided: object) -> str:
    """A SHA-256 over sources, and over what else decides the machine code.

    Args:
        files: Python (.py) with Triton kernels, or C++ and CUDA (all others).
        decided: flags, tile shapes and the like; their `repr` counts.
    """
    digest = hashlib.sha256()
    for path in sorted(files):
        text = path.read_text()
        source = triton_source(text) if path.suffix == ".py" else cpp_source(text)
        digest.update(f"{path.name}\0{source}\0".encode())
    for value in decided:
        digest.update(f"{value!r}\0".encode())
    return digest.hexdigest()


def triton_files(module: Path) -> list[Path]:
    """The file of a kernel and those of the package that its kernels import from."""
    found = [module]
    for path in found:
        for node in _imports(_kept(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                other = module.parent / f"{node.module.rpartition('.')[2]}.py"
                if node.module.startswith("dwl_kernels.") and other not in found:
                    found.append(other)
    return found


def triton_source(text: str) -> str:
    """The kernels of a Python file, their constants and the names that they import."""
    kept = _kept(text)
    imports = sorted(map(_dump, _imports(kept)))
    rest = [_dump(node) for node in kept if not isinstance(node, (ast.Import, ast.ImportFrom))]
    return "\n".join(one for one in [*imports, *rest] if one)


def _kept(text: str) -> list[ast.stmt]:
    """What is left of a file without the functions of the host and what only they import."""
    kept = [node for node in ast.parse(text).body if not _of_the_host(node)]
    used = {
        name.id
        for node in kept
        if not isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ast.walk(node)
        if isinstance(name, ast.Name)
    }
    for node in _imports(kept):
        node.names = [
            alias for alias in node.names if (alias.asname or alias.name).split(".")[0] in used
        ]
    return [n for n in kept if not isinstance(n, (ast.Import, ast.ImportFrom)) or n.names]


def _imports(nodes: list[ast.stmt]) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]


def _of_the_host(node: ast.stmt) -> bool:
    """A function that Triton does not compile."""
    return isinstance(node, ast.FunctionDef) and not any(
        ast.unparse(decorator).startswith("triton.") for decorator in node.decorator_list
    )


def _dump(node: Any) -> str:
    """As `ast.dump`, whose form depends on the version of Python; docstrings are left out."""
    if isinstance(node, list):
        return "[" + ",".join(filter(None, map(_dump, node))) + "]" if node else ""
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return ""  # a docstring, or some other text that nothing reads
    fields = [
        f"{name}={_dump(value)}"
        for name, value in ast.iter_fields(node)
        if value is not None and value != [] and name != "type_comment"
    ]
    return f"{type(node).__name__}({','.join(fields)})"


def cpp_source(text: str) -> str:
    """The tokens of C++ or CUDA, and where a directive of the preprocessor ends."""
    tokens: list[str] = []
    directive = False
    for token in _TOKEN.findall(text.replace("\\\n", " ")):
        if token.startswith(("//", "/*")):
            continue
        if token == "\n":
            if directive:
                tokens.append(token)
            directive = False
            continue
        if token == "#" and (not tokens or not directive):
            if tokens and tokens[-1] != "\n":
                tokens.append("\n")
            directive = True
        tokens.append(token)
    return " ".join(tokens)
