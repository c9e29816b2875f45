"""Blocks forward and backward: one table, and time and memory by width."""

from collections.abc import Mapping
from typing import Any

from kanlm.reporting.bench.parts import lines, rules, where
from kanlm.reporting.figures import Picture
from kanlm.reporting.format import count, duration, fixed, span
from kanlm.reporting.table import Table


def layer_tables(results: Mapping[str, Any]) -> list[Table]:
    """A row a width, block and mode."""
    settings = results["settings"]
    reference = _saved(results, "gelu", "eager")
    on_gpu = any(row.get("peak_bytes") is not None for row in results["rows"])

    def cells(row: Mapping[str, Any]) -> list[str]:
        peak = [count(row["peak_bytes"], "B")] if on_gpu else []
        return [
            row["block"],
            str(row["d_model"]),
            row["mode"],
            fixed(row["time_ratio"]["median"], 2),
            span([row["time_ratio"]["low"], row["time_ratio"]["high"]], 2),
            duration(row["seconds"]),
            fixed(row["saved_bytes"] / reference[row["d_model"]], 2),
            count(row["saved_bytes"], "B"),
            *peak,
            count(row["flops"] / row["seconds"], "FLOP/s"),
        ]

    groups = [where(results, d_model=width) for width in settings["widths"]]
    table = Table(
        title=f"Forward and backward of {settings['tokens']:,} tokens, {settings['dtype']}, "
        "equal parameters",
        columns=[
            "block",
            "d_model",
            "mode",
            "× MLP's time",
            "quartiles",
            "time",
            "× MLP's memory",
            "kept for backward",
            *(["peak on the GPU"] if on_gpu else []),
            "speed",
        ],
        rows=[cells(row) for group in groups for row in group],
        note="Time over that of the compiled GELU MLP, block beside block in the same process; "
        "the floor is 1, for all have the same products. "
        "Memory is what autograd keeps, counted.",
        rules=rules(groups),
    )
    return [table]


def layer_figures(results: Mapping[str, Any]) -> list[Picture]:
    """Time and memory over the MLP's, by width."""
    widths = results["settings"]["widths"]
    keys = list(dict.fromkeys((row["block"], row["mode"]) for row in results["rows"]))
    reference = _saved(results, "gelu", "eager")

    def line(block: str, mode: str, of: str) -> list[float]:
        rows = [where(results, d_model=w, block=block, mode=mode)[0] for w in widths]
        if of == "time":
            return [row["time_ratio"]["median"] for row in rows]
        return [row["saved_bytes"] / reference[row["d_model"]] for row in rows]

    return [
        lines(
            f"{of}-by-width",
            "d_model",
            {"time": "time over the MLP's", "memory": "kept for backward over the MLP's"}[of],
            widths,
            {f"{block}, {mode}": line(block, mode, of) for block, mode in keys},
        )
        for of in ("time", "memory")
    ]


def _saved(results: Mapping[str, Any], block: str, mode: str) -> dict[int, int]:
    """d_model → bytes kept for backward."""
    rows = where(results, block=block, mode=mode)
    return {row["d_model"]: row["saved_bytes"] for row in rows}
