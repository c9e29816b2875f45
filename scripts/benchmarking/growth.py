"""How the time of a block's forward and backward pass grows with tokens, width and grid.

1. One of the three grows, the others stay.
2. All blocks take turns at each size.
3. The exponent is the slope of log time over log size by least squares; beside it stands that of
   the FLOPs, counted, which is what time grows by where nothing else costs.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import linregress

from benchmarking.blocks import REFERENCE, matched_spec
from benchmarking.measure import interleaved, synchronizer
from benchmarking.report import Results, lines, markdown_table, rules, where
from kanlm.model.feed_forward import FeedForward, make_feed_forward
from kanlm.reporting.figures import Picture
from kanlm.reporting.format import duration, fixed
from kanlm.reporting.table import Table


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Forward and backward of blocks, eagerly, as one of their sizes grows."""

    tokens: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    widths: tuple[int, ...] = (128, 256, 512, 1024)
    #: Cells of linear B-splines, whose coefficients grow with them.
    grids: tuple[int, ...] = (4, 8, 16, 32)
    #: `d_model` and tokens while another size grows.
    width: int = 256
    token_count: int = 2048
    #: Blocks beside the GELU MLP, of equal parameters.
    blocks: tuple[Any, ...] = ("swiglu", "kan", "kan-local")
    rounds: int = 5
    device: str = "cpu"
    output_dir: str = "runs/bench/growth"

    def __post_init__(self) -> None:
        for name in ("tokens", "widths", "grids"):
            sizes = getattr(self, name)
            if len(set(sizes)) < 3:
                raise ValueError(f"{name} = {list(sizes)}: an exponent needs at least 3 sizes")


# Measuring


def measure(settings: Settings, report: Callable[[str], object]) -> list[dict]:
    """Return one row an axis and block: sizes, seconds, and the exponents of time and FLOPs.

    Raises:
        UserError: a block is unknown or has no width of equal parameters.
    """
    blocks = (REFERENCE, *settings.blocks)
    rows = []
    for axis, sizes in (("tokens", settings.tokens), ("d_model", settings.widths)):
        points = []
        for size in sizes:
            report(f"{axis} {size}")
            width = size if axis == "d_model" else settings.width
            tokens = size if axis == "tokens" else settings.token_count
            points.append(
                _measure(settings, [matched_spec(b, width) for b in blocks], width, tokens)
            )
        rows += _rows(axis, sizes, points)
    points = []
    for size in settings.grids:
        report(f"grid_size {size}")
        points.append(
            _measure(settings, [_on_grid(settings, size)], settings.width, settings.token_count)
        )
    return rows + _rows("grid_size", settings.grids, points)


def _on_grid(settings: Settings, grid_size: int) -> dict[str, Any]:
    """Describe a block of linear B-splines on so many cells, whose width stays as they grow."""
    spec = {"kind": "kan-local", "basis": {"kind": "bspline", "grid_size": settings.grids[0]}}
    hidden = matched_spec(spec, settings.width)["hidden"]
    return {**spec, "hidden": hidden, "basis": {"kind": "bspline", "grid_size": grid_size}}


def _measure(
    settings: Settings, specs: Sequence[dict[str, Any]], d_model: int, tokens: int
) -> list[dict]:
    """Return a block's kind, median seconds and FLOPs, of each."""
    torch.manual_seed(0)
    blocks = [make_feed_forward(spec, d_model, 1.0).to(settings.device) for spec in specs]
    x = torch.randn(tokens, d_model, device=settings.device, requires_grad=True)
    dy = torch.randn_like(x)
    steps = {
        str(index): functools.partial(_step, block, x, dy) for index, block in enumerate(blocks)
    }
    seconds = interleaved(steps, settings.rounds, synchronizer(settings.device))
    return [
        {
            "block": block.label if len(specs) > 1 else spec["kind"],
            "seconds": sorted(times)[settings.rounds // 2],
            "flops": 3 * block.flops_per_token * tokens,
        }
        for spec, block, times in zip(specs, blocks, seconds.values(), strict=True)
    ]


def _step(block: FeedForward, x: torch.Tensor, dy: torch.Tensor) -> None:
    block.zero_grad(set_to_none=True)
    x.grad = None
    block(x).backward(dy)


def _rows(axis: str, sizes: Sequence[int], points: Sequence[Sequence[dict]]) -> list[dict]:
    rows = []
    for series in zip(*points, strict=True):
        seconds = [point["seconds"] for point in series]
        flops = [point["flops"] for point in series]
        exponent, error = fitted_exponent(sizes, seconds)
        rows.append(
            {
                "axis": axis,
                "block": series[0]["block"],
                "sizes": list(sizes),
                "seconds": seconds,
                "flops": flops,
                "exponent": exponent,
                "standard_error": error,
                "flops_exponent": fitted_exponent(sizes, flops)[0],
            }
        )
    return rows


def fitted_exponent(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """Fit p of cost ∝ sizeᵖ by least squares of the logarithms, and its standard error."""
    fit: Any = linregress([math.log(size) for size in sizes], [math.log(cost) for cost in costs])
    return float(fit.slope), float(fit.stderr)


# Showing


_AXES = ("tokens", "d_model", "grid_size")


def tables(results: Results) -> list[Table]:
    """Tabulate a row an axis and block."""
    groups = [where(results, axis=axis) for axis in _AXES]

    def cells(row: Results) -> list[str]:
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


def figures(results: Results) -> list[Picture]:
    """Draw time over that of the smallest size."""
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


def section(results: Results) -> str:
    """Return the benchmark's part of the page, in Markdown."""
    rows = [
        [
            row["block"],
            row["axis"],
            f"{row['sizes'][0]:,} to {row['sizes'][-1]:,}",
            f"{fixed(row['exponent'], 2)} ± {fixed(row['standard_error'], 2)}",
            fixed(row["flops_exponent"], 2),
        ]
        for row in results["rows"]
    ]
    return (
        "**Growth**: p of time ∝ sizeᵖ, forward and backward, eager, and p of the FLOPs.\n\n"
        + markdown_table(["block", "size", "from", "p ± standard error", "p of FLOPs"], rows)
    )
