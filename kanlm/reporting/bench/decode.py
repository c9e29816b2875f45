"""Decoding: blocks by batch size and whole models by vocabulary, a table and figures of each."""

from collections.abc import Mapping
from typing import Any

from kanlm.reporting.bench.parts import lines, rules, where
from kanlm.reporting.figures import Picture
from kanlm.reporting.format import count, duration, fixed, span
from kanlm.reporting.table import Table


def decode_tables(results: Mapping[str, Any]) -> list[Table]:
    """Of the blocks, of whole models, of a layer, and of `generate`."""
    tables = (_blocks_table, _models_table, _layer_table, _generate_table)
    return [table(results) for table in tables]


def _blocks_table(results: Mapping[str, Any]) -> Table:
    settings = results["settings"]

    def cells(row: Mapping[str, Any]) -> list[str]:
        return [
            row["block"],
            row["dtype"],
            str(row["batch_size"]),
            fixed(row["time_ratio"]["median"], 2),
            span([row["time_ratio"]["low"], row["time_ratio"]["high"]], 2),
            fixed(row["bytes_ratio"], 2),
            duration(row["seconds_per_step"]),
            count(row["bytes_per_second"], "B/s"),
        ]

    groups = [
        where(results, what="blocks", dtype=dtype, batch_size=size)
        for dtype in settings["dtypes"]
        for size in settings["batch_sizes"]
    ]
    return Table(
        title=f"Feed-forward blocks of {settings['n_layers']} layers, d_model "
        f"{settings['d_model']}, a new input every step, equal parameters",
        columns=[
            "block",
            "dtype",
            "batch",
            "× MLP's time",
            "quartiles",
            "× MLP's bytes",
            "a step",
            "read at",
        ],
        rows=[cells(row) for group in groups for row in group],
        note="Bytes are the floor: weights that a step must read, those of coefficients for "
        "inputs spread evenly over the grid.",
        rules=rules(groups),
    )


def _models_table(results: Mapping[str, Any]) -> Table:
    settings = results["settings"]

    def cells(row: Mapping[str, Any]) -> list[str]:
        return [
            row["block"],
            row["dtype"],
            f"{row['vocab_size']:,}",
            fixed(row["time_ratio"]["median"], 2),
            span([row["time_ratio"]["low"], row["time_ratio"]["high"]], 2),
            fixed(row["bytes_ratio"], 2),
            fixed(row["share_of_allowed_speed"], 2),
            fixed(1 / row["seconds_per_token"], 1),
            count(row["bytes_per_second"], "B/s"),
        ]

    groups = [
        where(results, what="model", dtype=dtype, vocab_size=size)
        for dtype in settings["dtypes"]
        for size in settings["vocab_sizes"]
    ]
    return Table(
        title=f"Whole models of {settings['n_layers']} layers, d_model {settings['d_model']}, "
        "token by token, equal parameters",
        columns=[
            "block",
            "dtype",
            "vocabulary",
            "× MLP's time",
            "quartiles",
            "× MLP's bytes",
            "speed / allowed",
            "tokens/s",
            "read at",
        ],
        rows=[cells(row) for group in groups for row in group],
        note="Allowed is the speed of a model that reads its own bytes as fast as the MLP's model "
        "reads its.",
        rules=rules(groups),
    )


def _layer_table(results: Mapping[str, Any]) -> Table:
    groups = [where(results, what="layer", dtype=d) for d in results["settings"]["dtypes"]]
    return Table(
        title="A layer for a few tokens, new inputs every time",
        columns=["layer", "dtype", "tokens", "× Linear's time", "quartiles", "time"],
        rows=[
            [
                row["block"],
                row["dtype"],
                str(row["tokens"]),
                fixed(row["time_ratio"]["median"], 2),
                span([row["time_ratio"]["low"], row["time_ratio"]["high"]], 2),
                duration(row["seconds"]),
            ]
            for group in groups
            for row in group
        ],
        note="The Linear has as many weights as the layer coefficients, and inputs as many times "
        "wider.",
        rules=rules(groups),
    )


def _generate_table(results: Mapping[str, Any]) -> Table:
    settings = results["settings"]
    groups = [
        where(results, what="generate", dtype=dtype, vocab_size=size)
        for dtype in settings["dtypes"]
        for size in settings["generated_vocab_sizes"]
    ]
    return Table(
        title=f"generate at batch 1: {settings['n_layers']} layers, d_model "
        f"{settings['d_model']}, equal parameters",
        columns=[
            "block",
            "dtype",
            "vocabulary",
            "× Llama's tokens/s",
            "quartiles",
            "× Llama's bytes",
            "tokens/s",
        ],
        rows=[
            [
                row["block"],
                row["dtype"],
                f"{row['vocab_size']:,}",
                fixed(row["speed_ratio"]["median"], 2),
                span([row["speed_ratio"]["low"], row["speed_ratio"]["high"]], 2),
                fixed(row["bytes_ratio"], 2),
                fixed(row["tokens_per_second"], 1),
            ]
            for group in groups
            for row in group
        ],
        note="Beside transformers' own Llama of the same shape, in the same process.",
        rules=rules(groups),
    )


def decode_figures(results: Mapping[str, Any]) -> list[Picture]:
    """Time over the MLP's by batch size, and of whole models by vocabulary, for each dtype."""
    settings = results["settings"]
    return [
        lines(
            f"{name}-{dtype}",
            across.replace("_", " "),
            "time over the MLP's",
            settings[f"{across}s"],
            _times_by_block(results, what=what, dtype=dtype),
        )
        for dtype in settings["dtypes"]
        for name, what, across in (
            ("decode", "blocks", "batch_size"),
            ("decode-models", "model", "vocab_size"),
        )
    ]


def _times_by_block(results: Mapping[str, Any], **values: Any) -> dict[str, list[float]]:
    """Block → its times over the MLP's, in order of size."""
    times: dict[str, list[float]] = {}
    for row in where(results, **values):
        times.setdefault(row["block"], []).append(row["time_ratio"]["median"])
    return times
