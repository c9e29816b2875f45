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

import torch
from torch import Tensor, nn

from kanlm.errors import UserError
from kanlm.experiments.bench.blocks import REFERENCE, matched_block
from kanlm.experiments.bench.compiled import warn_of_scalar_code
from kanlm.experiments.bench.saved import saved_bytes
from kanlm.experiments.bench.settings import LayerBenchmark
from kanlm.experiments.bench.timing import interleaved, ratio, synchronizer
from kanlm.kan.kernels import use_backend


def measure_layers(settings: LayerBenchmark, report: Callable[[str], object]) -> list[dict]:
    """One row a width, block and mode: times over the compiled MLP's, bytes kept, FLOPs.

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


def _measure_width(settings: LayerBenchmark, d_model: int) -> list[dict]:
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
    """What a step takes of a GPU's memory beside what lies there before it; None elsewhere."""
    if not device.startswith("cuda"):
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before
