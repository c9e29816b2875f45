"""Tables and figures of a benchmark's results.json."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from kanlm.reporting.figures import MARKERS, PALETTE, STYLE, Picture, standalone_svg
from kanlm.reporting.numbers import count, duration, fixed, span
from kanlm.reporting.table import Table


def benchmark_table(results: Mapping[str, Any]) -> Table:
    """All rows of a benchmark."""
    return _TABLES[results["benchmark"]](results)


def benchmark_figures(results: Mapping[str, Any]) -> list[Picture]:
    """Figures of a benchmark, each an SVG of its own."""
    return _FIGURES[results["benchmark"]](results)


def _layer_table(results: Mapping[str, Any]) -> Table:
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

    groups = [_where(results, d_model=width) for width in settings["widths"]]
    return Table(
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
        rules=_rules(groups),
    )


def _decode_table(results: Mapping[str, Any]) -> Table:
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
        _where(results, dtype=dtype, batch_size=size)
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
        rules=_rules(groups),
    )


def _data_table(results: Mapping[str, Any]) -> Table:
    groups = [_where(results, what=what) for what in ("preparing", "batches")]

    def cells(row: Mapping[str, Any]) -> list[str]:
        length = row.get("context_length")
        return [
            row["what"] + ("" if length is None else f" of {row['batch_size']} × {length}"),
            row["tokenizer"],
            fixed(row["speed_ratio"]["median"], 2),
            span([row["speed_ratio"]["low"], row["speed_ratio"]["high"]], 2),
            count(row["tokens_per_second"]),
            fixed(row.get("megabytes_per_second"), 1),
            count(row.get("peak_memory_bytes"), "B"),
        ]

    text = groups[0][0]
    return Table(
        title=f"{text['megabytes']:.1f} MB of {results['settings']['source']} "
        f"in {text['documents']:,} documents",
        columns=["what", "tokenizer", "× floor", "quartiles", "tokens/s", "MB/s", "memory"],
        rows=[cells(row) for group in groups for row in group],
        note="Speed over that of a floor: for preparing (read, tokenise, write) the tokenizers "
        "library given all documents at once, on all cores; for batches numpy copying one. "
        "Memory is what preparing adds to a process at most.",
        rules=_rules(groups),
    )


def _rules(groups: Sequence[Sequence[Any]]) -> list[int]:
    """Rows that begin a group, but the first."""
    return list(itertools.accumulate(len(group) for group in groups))[:-1]


def _layer_figures(results: Mapping[str, Any]) -> list[Picture]:
    widths = results["settings"]["widths"]
    keys = list(dict.fromkeys((row["block"], row["mode"]) for row in results["rows"]))
    reference = _saved(results, "gelu", "eager")

    def line(block: str, mode: str, of: str) -> list[float]:
        rows = [_where(results, d_model=w, block=block, mode=mode)[0] for w in widths]
        if of == "time":
            return [row["time_ratio"]["median"] for row in rows]
        return [row["saved_bytes"] / reference[row["d_model"]] for row in rows]

    return [
        _lines(
            f"{of}-by-width",
            "d_model",
            {"time": "time over the MLP's", "memory": "kept for backward over the MLP's"}[of],
            widths,
            {f"{block}, {mode}": line(block, mode, of) for block, mode in keys},
        )
        for of in ("time", "memory")
    ]


def _decode_figures(results: Mapping[str, Any]) -> list[Picture]:
    sizes = results["settings"]["batch_sizes"]
    pictures = []
    for dtype in results["settings"]["dtypes"]:
        blocks = list(dict.fromkeys(row["block"] for row in results["rows"]))
        lines = {
            block: [
                _where(results, dtype=dtype, block=block, batch_size=size)[0]["time_ratio"][
                    "median"
                ]
                for size in sizes
            ]
            for block in blocks
        }
        pictures.append(
            _lines(f"decode-{dtype}", "batch size", "time over the MLP's", sizes, lines)
        )
    return pictures


def _lines(
    name: str, across: str, up: str, x: Sequence[float], lines: Mapping[str, Sequence[float]]
) -> Picture:
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
        axes.set_ylim(bottom=0)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        figure.legend(loc="outside right upper", frameon=False)
        return Picture(name, standalone_svg(figure))


def _where(results: Mapping[str, Any], **values: Any) -> list[Any]:
    return [
        row for row in results["rows"] if all(row[name] == value for name, value in values.items())
    ]


def _saved(results: Mapping[str, Any], block: str, mode: str) -> dict[int, int]:
    rows = _where(results, block=block, mode=mode)
    return {row["d_model"]: row["saved_bytes"] for row in rows}


_TABLES = {"layers": _layer_table, "decode": _decode_table, "data": _data_table}
_FIGURES = {"layers": _layer_figures, "decode": _decode_figures, "data": lambda results: []}
