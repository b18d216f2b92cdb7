"""The table of measured domains that `repr(DomainWeights)` prints."""

from __future__ import annotations

from dwl_kernels.domains.state import DomainState

_LONGEST_TABLE = 40  # rows; longer tables leave out their middle


def table_of(state: DomainState, names: list[str]) -> list[str]:
    """The lines of the table, dense to sparse."""
    known = bool(state.num_users > 0)
    share = (state.shares.double() / state.shares.sum().clamp(min=1)).tolist()
    sparsity, weights = state.sparsity().tolist(), state.weights.tolist()
    counts, users = state.interactions.tolist(), state.users.tolist()
    entropy = state.entropy.tolist()
    header = ["domain", "interactions", "share", "users", "entropy", "sparsity", "weight"]
    rows = [
        [
            names[d],
            f"{counts[d]:,}",
            f"{share[d]:.2%}",
            f"{users[d]:,}" if known else "-",
            f"{entropy[d]:.2f}" if known else "-",
            f"{sparsity[d]:.3f}",
            f"{weights[d]:.3f}",
        ]
        for d in sorted(range(state.num_domains), key=lambda d: -counts[d])
    ]
    if len(rows) > _LONGEST_TABLE:
        half = _LONGEST_TABLE // 2
        rows = [*rows[:half], ["..."] * len(header), *rows[-half:]]
    widths = [max(len(row[c]) for row in [header, *rows]) for c in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, ["-" * width for width in widths], *rows]
    ]
