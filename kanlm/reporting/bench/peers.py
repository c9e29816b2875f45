"""A layer beside other repositories': one table."""

from collections.abc import Mapping
from typing import Any

from kanlm.reporting.bench.parts import rules, where
from kanlm.reporting.format import MISSING, count, duration, fixed, span
from kanlm.reporting.table import Table


def peer_tables(results: Mapping[str, Any]) -> list[Table]:
    """Two rows a peer, number of tokens and mode."""
    settings = results["settings"]
    names = ("peer", "tokens", "mode")
    keys = dict.fromkeys(tuple(row[name] for name in names) for row in results["rows"])
    groups = [where(results, **dict(zip(names, key, strict=True))) for key in keys]

    def cells(row: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
        return [
            row["layer"],
            f"{row['tokens']:,}",
            row["mode"],
            fixed(row["time_ratio"]["median"], 2),
            span([row["time_ratio"]["low"], row["time_ratio"]["high"]], 2),
            duration(row["seconds"]),
            _times(row["saved_bytes"], ours["saved_bytes"]),
            count(row["saved_bytes"], "B"),
            count(row["parameters"]),
        ]

    table = Table(
        title=f"Forward and backward of a layer {settings['in_features']} → "
        f"{settings['out_features']}, {settings['grid_size']} cells, degree {settings['degree']}",
        columns=[
            "layer",
            "tokens",
            "mode",
            "× our time",
            "quartiles",
            "time",
            "× our memory",
            "kept for backward",
            "parameters",
        ],
        rows=[cells(row, group[0]) for group in groups for row in group],
        note="Above each peer stands kanlm with functions of the same sort: B-splines, or for "
        "fast-kan as many Gaussians. Memory is what autograd keeps beside the input.",
        rules=rules(groups),
    )
    return [table]


def _times(bytes_kept: int, ours: int) -> str:
    """Over ours, which may be nothing at all."""
    return fixed(bytes_kept / ours, 1) if ours else MISSING
