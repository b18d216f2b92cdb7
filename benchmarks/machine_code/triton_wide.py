"""The kernels of the wide form of the Triton backend, compiled: what an element of logits costs.

Counts registers, stack and shared memory, and of every loop instructions, spills, and how wide it
loads.
"""

from __future__ import annotations

import collections
from typing import Any

import torch

from benchmarks.machine_code.sass import Code, innermost, machine_code
from benchmarks.machine_code.triton_shared import Launch, compiled_for, example
from dwl_kernels.backends import triton_wide
from dwl_kernels.problem import RowWeights

NAMES = ("exponentials", "gradients", "columns")
Row = tuple[str, str, int, torch.dtype, bool, int, str]  # a kernel, and as of `triton_shared`


def launch_of(row: Row) -> tuple[Any, Launch, Any]:
    """A kernel, its launch by `triton_wide.solve`, and the shape it is compiled for."""
    name, kind, d, dtype, options, _, reduction = row
    problem, wanted = example(kind, d, dtype, options, reduction)
    row_grad = torch.zeros(len(problem.query)) if reduction == "none" else None
    weights = RowWeights(torch.ones(len(problem.query)), None, torch.ones(()))
    if problem.example_weights is not None:
        weights = weights._replace(active=problem.example_weights != 0)
    call = triton_wide.prepare(problem, weights, wanted, row_grad)
    one = call.launched[NAMES.index(name)]
    return one.kernel, Launch(one.arguments(0, 64, one.tensors), one.options), one.shape


def loops_of(sass: str) -> list[dict[str, Any]]:
    """The innermost loops in their order."""
    code = Code(sass)
    end = max(at for at, name in enumerate(code.names) if name == "EXIT")
    found = []
    for loop in innermost([one for one in code.loops if one.last < end]):
        texts = code.text[loop.first : loop.last + 1]
        kinds = collections.Counter(text.split()[0].split(".")[0] for text in texts)
        found.append(
            {
                "instructions": len(texts),
                "exponentials": sum(text.startswith("MUFU.EX2") for text in texts),
                "loads": kinds["LDG"],
                "loads_128": sum(text.startswith("LDG.E.128") for text in texts),
                "stores": kinds["STG"],
                "spills": kinds["LDL"] + kinds["STL"],
                "kinds": dict(kinds.most_common()),
            }
        )
    return found


def count(row: Row) -> dict[str, Any]:
    """One row of the table."""
    name, kind, d, dtype, options, capability, reduction = row
    kernel, launch, shape = launch_of(row)
    compiled = compiled_for(capability, kernel, launch)
    sass, usage = machine_code(compiled.asm["cubin"])
    elements = shape.BM.value * (shape.BD.value if name == "gradients" else shape.BN.value)
    loops = loops_of(sass)
    for loop in loops:
        threads = launch.options["num_warps"] * 32
        loop["per_element"] = round(loop["instructions"] * threads / elements, 2)
    return {
        "capability": capability,
        "kernel": name,
        "problem": kind + (", everything" if options else ", plain"),
        "reduction": reduction,
        "D": d,
        "dtype": str(dtype).removeprefix("torch."),
        "warps": launch.options["num_warps"],
        **usage,
        "shared": compiled.metadata.shared,
        "loops": loops,
    }
