"""Training steps of whole models: one table."""

from collections.abc import Mapping
from typing import Any

from kanlm.reporting.bench.parts import rules, where
from kanlm.reporting.format import count, duration, fixed, span
from kanlm.reporting.table import Table


def step_tables(results: Mapping[str, Any]) -> list[Table]:
    """A row a mode and block."""
    settings = results["settings"]
    groups = [where(results, mode=mode) for mode in settings["modes"]]

    def cells(row: Mapping[str, Any]) -> list[str]:
        return [
            row["block"],
            row["mode"],
            fixed(row["speed_ratio"]["median"], 2),
            span([row["speed_ratio"]["low"], row["speed_ratio"]["high"]], 2),
            fixed(row["time_over_llama"]["median"], 2),
            count(row["tokens_per_second"]),
            duration(row["seconds"]),
            count(row["parameters"]),
            count(row["flops"] / row["seconds"], "FLOP/s"),
        ]

    table = Table(
        title=f"Training step of {settings['batch_size']} × {settings['context_length']} tokens: "
        f"{settings['n_layers']} layers, d_model {settings['d_model']}, vocabulary "
        f"{settings['vocab_size']:,}, {settings['precision']}",
        columns=[
            "block",
            "mode",
            "× SwiGLU's speed",
            "quartiles",
            "× Llama's time",
            "tokens/s",
            "a step",
            "parameters",
            "speed",
        ],
        rows=[cells(row) for group in groups for row in group],
        note="Forward, backward, clipping and AdamW, beside the SwiGLU model of the same mode.",
        rules=rules(groups),
    )
    return [table]
