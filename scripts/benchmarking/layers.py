"""Time and memory of one block's forward and backward pass.

1. Every block gets the parameters of a GELU MLP of hidden width 4 d_model.
2. Bytes kept for backward are counted, eagerly and compiled.
3. All blocks, eager and compiled, take turns with the compiled MLP.
4. On a GPU, the peak of its memory is measured: `device=cuda dtype=bfloat16 widths=[1024]
   tokens=65536`. With `backend=recompute` that is Inductor's fusion of basis and product, which
   TORCHINDUCTOR_MAX_AUTOTUNE=1 has tried in full.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarking.blocks import REFERENCE, matched_block
from benchmarking.measure import interleaved, ratio, saved_bytes, synchronizer, warn_of_scalar_code
from benchmarking.report import Results, lines, markdown_table, rules, saved_by_mlp, where
from kanlm.errors import UserError
from kanlm.kan.kernels import Backend, use_backend
from kanlm.reporting.figures import Picture
from kanlm.reporting.format import count, duration, fixed, span
from kanlm.reporting.table import Table


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Forward and backward of one block, at several widths."""

    #: `d_model` of the blocks; every block has 8 d_model² parameters.
    widths: tuple[int, ...] = (256, 512, 768)
    tokens: int = 4096
    dtype: Literal["float32", "bfloat16"] = "float32"
    #: Blocks beside the compiled GELU MLP that all are measured against.
    blocks: tuple[Any, ...] = ("swiglu", "kan", "kan-local")
    #: What adds up the edges' functions of all blocks (kanlm.kan.kernels).
    backend: Backend = "auto"
    rounds: int = 9
    device: str = "cpu"
    output_dir: str = "runs/bench/layers"


# Measuring


def measure(settings: Settings, report: Callable[[str], object]) -> list[dict]:
    """Return one row a width, block and mode: times over the compiled MLP's, bytes kept, FLOPs.

    Raises:
        UserError: a block is unknown or has no such width, or the backend cannot take it.
    """
    warn_of_scalar_code(settings.device, report)
    rows = []
    for width in settings.widths:
        report(f"d_model {width}")
        with use_backend(settings.backend):
            rows += _measure_width(settings, width)
    return rows


def _measure_width(settings: Settings, d_model: int) -> list[dict]:
    dtype = getattr(torch, settings.dtype)
    torch.manual_seed(0)
    blocks = {}
    for spec in (REFERENCE, *settings.blocks):
        block = matched_block(spec, d_model).to(settings.device, dtype)
        blocks[block.label] = block
    # Every block and width is a graph of its own.
    torch._dynamo.reset()
    x = torch.randn(settings.tokens, d_model, device=settings.device, dtype=dtype)
    x.requires_grad_()
    dy = torch.randn_like(x)
    for block in blocks.values():
        try:
            block(x)
        except ValueError as error:  # of a backend that cannot
            raise UserError(str(error)) from None
    runs: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {}
    for label, block in blocks.items():
        runs[label, "compiled"] = torch.compile(block, fullgraph=True, dynamic=False)
        runs[label, "eager"] = block
    kept = {key: saved_bytes(run, x, blocks[key[0]]) for key, run in runs.items()}
    steps = {
        f"{label} {mode}": functools.partial(_step, run, blocks[label], x, dy)
        for (label, mode), run in runs.items()
    }
    seconds = interleaved(steps, settings.rounds, synchronizer(settings.device))
    peaks = {name: _peak_bytes(step, settings.device) for name, step in steps.items()}
    reference = seconds[f"{REFERENCE} compiled"]
    return [
        {
            "d_model": d_model,
            "block": label,
            "mode": mode,
            "time_ratio": ratio(seconds[f"{label} {mode}"], reference),
            "seconds": sorted(seconds[f"{label} {mode}"])[settings.rounds // 2],
            "saved_bytes": kept[label, mode],
            "peak_bytes": peaks[f"{label} {mode}"],
            "parameters": sum(p.numel() for p in blocks[label].parameters()),
            # Backward takes twice the forward's.
            "flops": 3 * blocks[label].flops_per_token * settings.tokens,
        }
        for label, mode in runs
    ]


def _step(run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, dy: Tensor) -> None:
    module.zero_grad(set_to_none=True)
    x.grad = None
    run(x).backward(dy)


def _peak_bytes(step: Callable[[], object], device: str) -> int | None:
    """Measure what a step adds to the memory in use on a GPU; None elsewhere."""
    if not device.startswith("cuda"):
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


# Showing


def tables(results: Results) -> list[Table]:
    """Tabulate a row a width, block and mode."""
    settings = results["settings"]
    reference = _saved(results, "gelu", "eager")
    on_gpu = any(row.get("peak_bytes") is not None for row in results["rows"])

    def cells(row: Results) -> list[str]:
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


def figures(results: Results) -> list[Picture]:
    """Draw time and memory over the MLP's, by width."""
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


def _saved(results: Results, block: str, mode: str) -> dict[int, int]:
    """Map d_model to bytes kept for backward."""
    rows = where(results, block=block, mode=mode)
    return {row["d_model"]: row["saved_bytes"] for row in rows}


def section(results: Results) -> str:
    """Return the benchmark's part of the page, in Markdown."""
    settings, rows = results["settings"], results["rows"]
    widths = settings["widths"]
    memory = saved_by_mlp(results)

    def cells(block: str, mode: str) -> list[str]:
        own = [row for row in rows if (row["block"], row["mode"]) == (block, mode)]
        times = [fixed(row["time_ratio"]["median"], 2) for row in own]
        kept = {fixed(row["saved_bytes"] / memory[row["d_model"]], 2) for row in own}
        return [block, mode, *times, "–".join(sorted(kept))]

    keys = dict.fromkeys((row["block"], row["mode"]) for row in rows)
    heads = ["block", "mode", *(f"d_model {w}" for w in widths), "memory"]
    return (
        f"**A block, forward and backward**, {settings['tokens']:,} tokens, {settings['dtype']}, "
        "equal parameters: time over that of the *compiled* GELU MLP (floor 1: equally many "
        "multiply-adds), and bytes kept for backward over the eager MLP's.\n\n"
        + markdown_table(heads, [cells(*key) for key in keys])
    )
