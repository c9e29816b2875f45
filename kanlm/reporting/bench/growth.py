"""How cost grows: the exponents, and a figure an axis."""

from collections.abc import Mapping
from typing import Any

from kanlm.reporting.bench.parts import lines, rules, where
from kanlm.reporting.figures import Picture
from kanlm.reporting.format import duration, fixed
from kanlm.reporting.table import Table

_AXES = ("tokens", "d_model", "grid_size")


def growth_tables(results: Mapping[str, Any]) -> list[Table]:
    """A row an axis and block."""
    groups = [where(results, axis=axis) for axis in _AXES]

    def cells(row: Mapping[str, Any]) -> list[str]:
        return [
            row["block"],
            row["axis"],
            f"{row['sizes'][0]:,} to {row['sizes'][-1]:,}",
            fixed(row["exponent"], 2),
            fixed(row["standard_error"], 2),
            fixed(row["flops_exponent"], 2),
            duration(row["seconds"][0]),
            duration(row["seconds"][-1]),
        ]

    settings = results["settings"]
    table = Table(
        title="Time of forward and backward ∝ sizeᵖ; else "
        f"d_model {settings['width']}, {settings['token_count']:,} tokens",
        columns=["block", "size", "from", "p", "standard error", "p of FLOPs", "first", "last"],
        rows=[cells(row) for group in groups for row in group],
        note="Blocks have equal parameters where tokens and d_model grow; on a larger grid a "
        "block keeps its width and has more.",
        rules=rules(groups),
    )
    return [table]


def growth_figures(results: Mapping[str, Any]) -> list[Picture]:
    """Time over that of the smallest size."""
    pictures = []
    for axis in _AXES:
        rows = where(results, axis=axis)
        by_block = {
            row["block"]: [seconds / row["seconds"][0] for seconds in row["seconds"]]
            for row in rows
        }
        sizes = rows[0]["sizes"]
        name, up = f"growth-{axis}", "time over the smallest's"
        pictures.append(lines(name, axis, up, sizes, by_block, powers=True))
    return pictures
