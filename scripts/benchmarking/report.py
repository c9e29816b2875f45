"""What tables, figures and sections of all benchmarks are made of."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from kanlm.reporting.figures import MARKERS, PALETTE, STYLE, Picture, standalone_svg

#: What a benchmark's results.json holds.
Results = Mapping[str, Any]


def where(results: Results, **values: Any) -> list[Any]:
    """Return rows that have all these values."""
    return [
        row
        for row in results["rows"]
        if all(row.get(name) == value for name, value in values.items())
    ]


def rules(groups: Sequence[Sequence[Any]]) -> list[int]:
    """Return rows that begin a group, but the first."""
    return list(itertools.accumulate(len(group) for group in groups))[:-1]


def lines(
    name: str,
    across: str,
    up: str,
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    *,
    powers: bool = False,
) -> Picture:
    """Draw a line a label over sizes that double; from zero up, so that heights compare.

    Args:
        powers: whether values are powers of the sizes: then slopes compare.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        for index, (label, values) in enumerate(lines.items()):
            axes.plot(
                x,
                values,
                label=label,
                color=PALETTE[index % len(PALETTE)],
                marker=MARKERS[index % len(MARKERS)],
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [str(each) for each in x])
        if powers:
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(ScalarFormatter())
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        figure.legend(loc="outside right upper", frameon=False)
        return Picture(name, standalone_svg(figure))


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def of_block(results: Results, block: str, **values: Any) -> list[Mapping[str, Any]]:
    """Return rows of the first block whose label begins so, that have all these values."""
    name = next(r["block"] for r in results["rows"] if r["block"].startswith(block))
    return [
        row
        for row in results["rows"]
        if row["block"] == name and all(row.get(key) == value for key, value in values.items())
    ]


def saved_by_mlp(layers: Results) -> dict[int, int]:
    """Map d_model to bytes that the eager MLP keeps for backward."""
    return {row["d_model"]: row["saved_bytes"] for row in of_block(layers, "gelu", mode="eager")}
