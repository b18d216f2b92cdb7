"""Reads the machine code of a kernel: registers, stack, and what its loops execute."""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TENSOR = frozenset(("HMMA", "HGMMA", "UTCHMMA", "DMMA"))  # mma.sync, wgmma, tcgen05
# Without tensor cores: a branch around so many multiplications is a product.
PRODUCT = 64


def machine_code(binary: bytes) -> tuple[str, dict[str, int]]:
    """The disassembly, and registers and stack as `cuobjdump -res-usage` reports them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        dump = [str(TOOLS / "cuobjdump")]
        usage = subprocess.run(
            [*dump, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        nvdisasm = TOOLS / "nvdisasm"
        code = [str(nvdisasm), "-c"] if nvdisasm.exists() else [*dump, "-sass"]
        sass = subprocess.run([*code, file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None
    return sass, {"registers": int(found[1]), "stack": int(found[2])}


class Span(NamedTuple):
    """Instructions `first` to `last`."""

    first: int
    last: int

    def holds(self, other: Span) -> bool:
        return self.first <= other.first and other.last <= self.last and self != other


class Code:
    """Instructions, and the branches between them.

    Args:
        products: the instructions of a product, of which a block with one has at least `least`.
    """

    def __init__(self, sass: str, products: Iterable[str] = TENSOR, least: int = 1) -> None:
        labels: dict[str, int] = {}
        self.text: list[str] = []
        for line in sass.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = len(self.text)
            elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
                self.text.append(re.sub(r"^@!?U?P\w+\s+", "", instruction[1]))
        self.operations = [text.split()[0] for text in self.text]
        self.names = [operation.split(".")[0] for operation in self.operations]
        self.products, self.least = frozenset(products), least
        self.loops: list[Span] = []
        self.skips: list[Span] = []  # what a branch forward jumps over
        for at, text in enumerate(self.text):
            if branch := re.search(r"\bBRA\b.*?(\.L_x_\d+)", text):
                to = labels[branch[1]]
                if to > at:
                    self.skips.append(Span(at + 1, to - 1))
                else:
                    self.loops.append(Span(to, at))

    def count_products(self, span: Span) -> int:
        return sum(name in self.products for name in self.names[span.first : span.last + 1])

    def multiplies(self, span: Span) -> bool:
        return self.count_products(span) >= self.least

    def executed(self, loop: Span) -> list[int]:
        """What one turn executes. Blocks that a branch inside the loop skips, masks at the edges,
        do not count. Those with products do: on 10.0 one warp goes through them for all."""
        skipped = {
            at
            for skip in self.skips
            if loop.first < skip.first and skip.last <= loop.last and not self.multiplies(skip)
            for at in range(skip.first, skip.last + 1)
        }
        return [at for at in range(loop.first, loop.last + 1) if at not in skipped]

    def shortest(self, loop: Span) -> int:
        """The instructions of a turn where every branch inside of the loop skips."""
        inside = [s for s in self.skips if loop.first < s.first and s.last <= loop.last]
        skipped = {at for skip in inside for at in range(skip.first, skip.last + 1)}
        return loop.last + 1 - loop.first - len(skipped)


def innermost(loops: list[Span]) -> list[Span]:
    return [one for one in loops if not any(one.holds(other) for other in loops)]


def main_loops(sass: str) -> list[dict[str, Any]]:
    """What one turn of each innermost loop with tensor instructions executes.

    And how many of these load or store spilled registers. `shortest` leaves out the blocks that a
    branch can skip.
    """
    code = Code(sass)
    # Waits for barriers stand behind the end and branch back to where they came from: no loops.
    end = max(at for at, name in enumerate(code.names) if name == "EXIT")
    found = []
    for loop in innermost([one for one in code.loops if one.last < end and code.multiplies(one)]):
        kinds = collections.Counter(code.names[at] for at in code.executed(loop))
        found.append({**counts(kinds), "shortest": code.shortest(loop)})
    return found


def counts(kinds: collections.Counter[str]) -> dict[str, Any]:
    spills = kinds["LDL"] + kinds["STL"]
    return {
        "instructions": kinds.total(),
        "spills": spills,
        "kinds": dict(kinds.most_common()),
    }


def step_loops(sass: str, product: str, logits: int) -> list[dict[str, Any]]:
    """Loops over the steps of the CUDA kernel, as `main_loops` has them, in the order search for
    the maxima, phase 1, phase 2.

    A step waits for the copies of its block. Where its first product is a loop inside, that loop's
    instructions count as often as it turns.

    Args:
        product: the instruction that multiplies.
        logits: how many of them the first product of a step takes.
    """
    code = Code(sass, [product], 1 if product in TENSOR else PRODUCT)
    found = []
    for step in innermost([one for one in code.loops if "LDGDEPBAR" in code.names[slice(*one)]]):
        loops = [one for one in code.loops if step.holds(one) and code.multiplies(one)]
        kinds: collections.Counter[str] = collections.Counter()
        shared = 0
        for at in code.executed(step):
            times = 1
            for loop in loops:
                if loop.first <= at <= loop.last:
                    times = logits // code.count_products(loop)
            kinds[code.names[at]] += times
            shared += times * shared_bytes(code.operations[at])
        found.append({**counts(kinds), "shared_bytes": shared})
    return found


def shared_bytes(operation: str) -> int:
    """Bytes that a lane reads from shared memory or writes to it by registers."""
    name, *parts = operation.split(".")
    if name == "LDSM":  # 4 bytes of each 8 by 8 matrix
        return 4 * int(parts[-1])
    if name not in ("LDS", "STS"):
        return 0
    return next((int(part) // 8 for part in parts if part in ("64", "128")), 4)
