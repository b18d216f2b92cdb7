"""The PTX that leaves hits out of a block, run by a reader of its few instructions."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("triton")
from dwl_kernels.backends.triton.kernels.hits import INFINITY, PAIRS, ZERO, hits_assembly, operands

MASK = 2**32 - 1
ONE = "0f3F800000"


def result_of(assembly: str, one: list[int], other: list[int]) -> tuple[list[str], bool]:
    """What becomes of PAIRS numbers, all ONE, and whether whole ids were looked at."""
    found: dict[str, object] = {f"${i}": ONE for i in range(PAIRS)}
    found |= {f"${2 * PAIRS + i}": x for i, x in enumerate([*one, *other])}
    looked = True

    def value(operand: str) -> object:
        return found[operand] if operand in found else int(operand, 0)

    for line in assembly.strip("{}\n").splitlines():
        text = line.rstrip(";")
        if text.startswith(".reg") or text == "done:":
            continue
        if text.startswith("@"):
            guard, text = text.split(" ", 1)
            if bool(found[guard.strip("@!")]) == ("!" in guard):
                continue
        operation, rest = text.split(" ", 1)
        name, *kinds = operation.split(".")
        arguments = rest.split(", ")
        if name == "bra":
            assert arguments == ["done"]
            looked = False
            break
        if name == "mov":
            found[arguments[0]] = arguments[1]
        elif name == "cvt":
            found[arguments[0]] = int(str(value(arguments[1]))) & MASK
        else:
            assert name == "setp"
            x, y = value(arguments[1]), value(arguments[2])
            holds = (x == y) == (kinds[0] == "eq")
            if len(arguments) == 4:
                before = bool(found[arguments[3]])
                holds = (holds or before) if kinds[1] == "or" else (holds and before)
            found[arguments[0]] = holds
    return [str(found[f"${i}"]) for i in range(PAIRS)], looked


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("value", [ZERO, INFINITY])
def test_numbers_of_the_same_id_are_replaced(bits: int, value: str) -> None:
    ids = [-1, 0, 1, 5, -7, 2**31 - 1, -(2**31)]
    if bits == 64:  # some agree in their low words with others, and -1 with 2^32 - 1
        ids += [x + y for x in ids for y in (2**32, -(2**32), 2**62)]
    draw = random.Random(bits)
    seen = set()
    for _ in range(2000):
        some = draw.sample(ids, draw.randint(2, len(ids)))
        one, other = ([draw.choice(some) for _ in range(PAIRS)] for _ in range(2))
        got, looked = result_of(hits_assembly(value, bits), one, other)
        hits = [a == b != -1 for a, b in zip(one, other, strict=True)]
        assert got == [value if hit else ONE for hit in hits]
        assert looked == any((a ^ b) & MASK == 0 for a, b in zip(one, other, strict=True))
        seen.add((any(hits), looked))
    assert seen == {(True, True), (False, True), (False, False)}


def test_every_operand_is_named_once() -> None:
    for kind, bits in (("r", 32), ("l", 64)):
        assert operands(kind).count(",") + 1 == 4 * PAIRS
        for place in (*range(PAIRS), *range(2 * PAIRS, 4 * PAIRS)):
            assert f"${place}" in hits_assembly(ZERO, bits)
