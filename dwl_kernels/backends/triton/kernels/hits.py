"""Leaving hits out of a block: a candidate with the id of a row is none of its negatives.

Ids have 64 bits, and hits are rare. So a thread compares the low words of a few pairs, one
instruction each, and looks at whole ids, and changes something, only where two of them agree: a
branch of a thread, which Triton has no word for. In the interpreter the plain formula runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dwl_kernels.backends.triton.kernels.common import NO_ITEM

# With 16 a step has a few instructions less, but twice as many pairs pay for a hit among them.
PAIRS = 8  # that share a branch


def hits_assembly(value: str, bits: int) -> str:
    """PTX that puts `value` into those of PAIRS numbers whose ids are the same, and no NO_ITEM.

    Ids have so many `bits`.

    Operands: the numbers, to be changed in place; the numbers again; the ids of one side; those of
    the other.
    """
    number, _, one, other = ([f"${k * PAIRS + i}" for i in range(PAIRS)] for k in range(4))
    lines = [".reg .pred some, hit;", ".reg .b32 x, y;", "setp.ne.b32 some, 0, 0;"]
    for a, b in zip(one, other, strict=True):
        lines += [f"cvt.u32.u{bits} x, {a};", f"cvt.u32.u{bits} y, {b};"]
        lines.append("setp.eq.or.u32 some, x, y, some;")
    lines.append("@!some bra done;")
    for z, a, b in zip(number, one, other, strict=True):
        lines.append(f"setp.ne.s{bits} hit, {a}, {NO_ITEM.value};")
        lines.append(f"setp.eq.and.s{bits} hit, {a}, {b}, hit;")
        lines.append(f"@hit mov.b32 {z}, {value};")
    return "\n".join(["{", *lines, "done:", "}"])


def operands(id_kind: str) -> str:
    """The constraints of `hits_assembly`."""
    places = [str(i) for i in range(PAIRS)]
    return ",".join(["=f"] * PAIRS + places + [id_kind] * (2 * PAIRS))


ZERO, INFINITY = "0f00000000", "0fFF800000"
ZEROS_32 = tl.constexpr(hits_assembly(ZERO, 32))
ZEROS_64 = tl.constexpr(hits_assembly(ZERO, 64))
INFINITIES_32 = tl.constexpr(hits_assembly(INFINITY, 32))
INFINITIES_64 = tl.constexpr(hits_assembly(INFINITY, 64))
OPERANDS_32 = tl.constexpr(operands("r"))
OPERANDS_64 = tl.constexpr(operands("l"))
PACK = tl.constexpr(PAIRS)


@triton.jit
def without_hits(z, id, other_id, value: tl.constexpr, ctx):
    """`z` with `value`, 0 or -inf, where the ids of both sides are the same."""
    if ctx.form.COMPILED:
        short: tl.constexpr = (id.dtype == tl.int32) and (other_id.dtype == tl.int32)
        ids: tl.constexpr = tl.int32 if short else tl.int64
        kinds: tl.constexpr = OPERANDS_32 if short else OPERANDS_64
        zeros: tl.constexpr = ZEROS_32 if short else ZEROS_64
        infinities: tl.constexpr = INFINITIES_32 if short else INFINITIES_64
        assembly: tl.constexpr = zeros if value == 0 else infinities
        z, id = tl.broadcast(z, id.to(ids))
        z, other_id = tl.broadcast(z, other_id.to(ids))
        return tl.inline_asm_elementwise(
            assembly, kinds, [z, id, other_id], dtype=tl.float32, is_pure=True, pack=PACK
        )
    else:
        return tl.where((id == other_id) & (id != NO_ITEM), value, z)
