"""Time of a model's feed-forward blocks over new inputs, at several batch sizes.

Inputs are new at every step: rows that a repeated input reads would still be in cache, and
flatter a block that reads few.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarking.blocks import REFERENCE, matched_block
from benchmarking.decode_model import measure_models, models_table, speed
from benchmarking.generate import (
    few_tokens_section,
    generate_section,
    generate_table,
    layer_table,
    measure_few_tokens,
    measure_generate,
)
from benchmarking.measure import bytes_read, interleaved, ratio
from benchmarking.report import Results, lines, markdown_table, rules, where
from kanlm.kan import decoding
from kanlm.model.feed_forward import FeedForward
from kanlm.reporting.figures import Picture
from kanlm.reporting.format import count, duration, fixed, span
from kanlm.reporting.table import Table

_OTHER_BASES = ("chebyshev", "legendre", "rbf", "fourier", "wavelet", "rational", "implicit")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The blocks of a model given one new input after another, and the whole model."""

    d_model: int = 768
    n_layers: int = 12
    n_heads: int = 12
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    #: Of whole models, at batch 1.
    vocab_sizes: tuple[int, ...] = (256, 8192, 49152)
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    #: Blocks beside the GELU MLP that all are measured against.
    blocks: tuple[Any, ...] = field(
        default=(
            {"kind": "kan-local", "basis": {"kind": "bspline", "grid_size": 6}},
            {"kind": "kan-local", "basis": {"kind": "bspline", "grid_size": 14}},
            {"kind": "kan-local", "base": None, "basis": {"kind": "bspline", "grid_size": 15}},
            {"kind": "kan-local", "base": None, "basis": {"kind": "bspline", "grid_size": 31}},
        )
    )
    rounds: int = 9
    #: Blocks of models that generate beside transformers' Llama.
    generated: tuple[Any, ...] = ("swiglu", "kan", "kan-glu", "kan-local")
    generated_vocab_sizes: tuple[int, ...] = (4096, 50304)
    #: More of them, in the first dtype and vocabulary alone.
    other_generated: tuple[Any, ...] = field(
        default=(
            "kan-single",
            "conv-kan",
            "moe",
            *({"kind": "kan", "basis": {"kind": kind}} for kind in _OTHER_BASES),
        )
    )
    generate_rounds: int = 5
    output_dir: str = "runs/bench/decode"


# Measuring


#: Inputs before they repeat: the weights that they touch are then out of every cache.
_INPUTS = 512
#: Steps timed as one, about as long as a few milliseconds.
_STEPS = 8


def measure(settings: Settings, report: Callable[[str], object]) -> list[dict]:
    """Return one row a dtype, batch size and block, then those of whole models, of a layer, and of
    `generate`.

    Raises:
        UserError: a block is unknown or has no width of equal parameters.
    """
    rows = []
    for name in settings.dtypes:
        dtype = getattr(torch, name)
        torch.manual_seed(0)
        stacks = {}
        for spec in (REFERENCE, *settings.blocks):
            stack = [matched_block(spec, settings.d_model) for _ in range(settings.n_layers)]
            stacks[stack[0].label] = [block.to(dtype).eval() for block in stack]
        for batch_size in settings.batch_sizes:
            report(f"{name}, batch size {batch_size}")
            rows += _measure_batch(settings, stacks, dtype, batch_size)
    rows += measure_models(settings, report)
    rows += measure_few_tokens(settings, report)
    return rows + measure_generate(settings, report)


@torch.inference_mode()
def _measure_batch(
    settings: Settings,
    stacks: dict[str, list[FeedForward]],
    dtype: torch.dtype,
    batch_size: int,
) -> list[dict]:
    inputs = torch.randn(_INPUTS, batch_size, settings.d_model).to(dtype)
    runs = {
        label: functools.partial(_decode, stack, itertools.cycle(inputs.unbind()))
        for label, stack in stacks.items()
    }
    seconds = interleaved(runs, settings.rounds, lambda: None)
    reference = bytes_read(stacks[REFERENCE][0])
    rows = []
    for label, stack in stacks.items():
        read = bytes_read(stack[0], batch_size)
        median = sorted(seconds[label])[settings.rounds // 2] / _STEPS
        rows.append(
            {
                "what": "blocks",
                "dtype": str(dtype).removeprefix("torch."),
                "batch_size": batch_size,
                "block": label,
                "time_ratio": ratio(seconds[label], seconds[REFERENCE]),
                "seconds_per_step": median,
                "bytes_ratio": read / reference,
                "bytes_per_second": read * len(stack) / median,
            }
        )
    return rows


def _decode(stack: Sequence[nn.Module], inputs: Iterator[Tensor]) -> None:
    with decoding(nn.ModuleList(stack)):
        for x in itertools.islice(inputs, _STEPS):
            for block in stack:
                block(x)


# Showing


def tables(results: Results) -> list[Table]:
    """Tabulate the blocks, whole models, a layer, and `generate`."""
    tables = (_blocks_table, models_table, layer_table, generate_table)
    return [table(results) for table in tables]


def _blocks_table(results: Results) -> Table:
    settings = results["settings"]

    def cells(row: Results) -> list[str]:
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


def figures(results: Results) -> list[Picture]:
    """Draw time over the MLP's by batch size, and of whole models by vocabulary, for each dtype."""
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


def _times_by_block(results: Results, **values: Any) -> dict[str, list[float]]:
    """Return block → its times over the MLP's, in order of size."""
    times: dict[str, list[float]] = {}
    for row in where(results, **values):
        times.setdefault(row["block"], []).append(row["time_ratio"]["median"])
    return times


def section(results: Results) -> str:
    """Return the benchmark's part of the page, in Markdown."""
    settings, rows = results["settings"], results["rows"]
    sizes = settings["batch_sizes"]
    blocks = dict.fromkeys(row["block"] for row in rows if row["what"] == "blocks")

    def of(**values: Any) -> list[Mapping[str, Any]]:
        return [row for row in rows if all(row.get(k) == v for k, v in values.items())]

    def times(found: Iterable[Mapping[str, Any]]) -> list[str]:
        return [
            count(row["bytes_per_second"], "B/s")
            if row["block"].startswith("gelu")
            else fixed(row["time_ratio"]["median"], 2)
            for row in found
        ]

    keys = [(block, dtype) for dtype in settings["dtypes"] for block in blocks]
    by_batch = [
        [
            block,
            dtype,
            fixed(of(what="blocks", block=block, dtype=dtype)[0]["bytes_ratio"], 2),
            *times(of(what="blocks", block=block, dtype=dtype)),
        ]
        for block, dtype in keys
    ]
    by_vocabulary = [
        [
            block,
            dtype,
            *map(speed, of(what="model", block=block, dtype=dtype)),
        ]
        for block, dtype in keys
    ]
    heads = ["block", "dtype", "bytes", *(f"batch {size}" for size in sizes)]
    vocabularies = [f"vocabulary {size:,}" for size in settings["vocab_sizes"]]
    return (
        f"**Decoding, feed-forward blocks alone**: {settings['n_layers']} layers, d_model "
        f"{settings['d_model']}, a new input every step: time over the GELU MLP's by batch size, "
        "and how fast the MLP reads its weights. The floor at batch 1 is the share of the MLP's "
        "bytes that are read. The MLP is torch's own; where it reads several times more slowly "
        "than at batch 1, it waits for its products, which on processors without instructions for "
        "bfloat16 are slow, and a ratio there says more of them than of KANs.\n\n"
        + markdown_table(heads, by_batch)
        + "\n\n**Decoding, whole models**, batch 1: tokens a second, and in brackets that over "
        "what a model would reach that reads its own bytes as fast as the MLP's model reads "
        "its.\n\n"
        + markdown_table(["block", "dtype", *vocabularies], by_vocabulary)
        + few_tokens_section(results)
        + generate_section(results)
    )
