"""Time and memory of one block's forward and backward pass.

1. Every block gets the parameters of a GELU MLP of hidden width 4 d_model.
2. Bytes kept for backward are counted, eagerly and compiled.
3. All blocks, eager and compiled, take turns with the compiled MLP.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.cpu_vec_isa import pick_vec_isa

from kanlm.errors import UserError
from kanlm.experiments.bench.saved import saved_bytes
from kanlm.experiments.bench.settings import LayerBenchmark
from kanlm.experiments.bench.timing import interleaved, ratio
from kanlm.model.feed_forward import FeedForward, make_feed_forward
from kanlm.model.matching import DEFAULT_PARAMETERS, has_width, solve_hidden

#: What all blocks are measured against, compiled.
REFERENCE = "gelu"


def measure_layers(settings: LayerBenchmark, report: Callable[[str], object]) -> list[dict]:
    """One row a width, block and mode: times over the compiled MLP's, bytes kept, FLOPs."""
    if settings.device == "cpu" and not pick_vec_isa():
        report(
            "torch.compile finds no vector instructions, so compiled times will mean little: it "
            "gives up looking on a busy machine; try again on a quiet one"
        )
    rows = []
    for width in settings.widths:
        report(f"d_model {width}")
        rows += _measure_width(settings, width)
    return rows


def matched_block(spec: Any, d_model: int) -> FeedForward:
    """The block of a kind that has the MLP's parameters.

    Raises:
        UserError: the kind or an option is unknown, or the block has no such width.
    """
    described: dict[str, Any] = {"kind": spec} if isinstance(spec, str) else dict(spec)
    try:
        if has_width(described):
            parameters = DEFAULT_PARAMETERS * d_model**2
            described["hidden"] = solve_hidden(described, d_model, parameters=parameters)
        return make_feed_forward(described, d_model, 1.0)
    except ValueError as error:
        raise UserError(f"blocks: {error}") from None


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
    runs: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {}
    for label, block in blocks.items():
        runs[label, "compiled"] = torch.compile(block, fullgraph=True, dynamic=False)
        runs[label, "eager"] = block
    kept = {key: saved_bytes(run, x, blocks[key[0]]) for key, run in runs.items()}
    steps = {
        f"{label} {mode}": functools.partial(_step, run, blocks[label], x, dy)
        for (label, mode), run in runs.items()
    }
    seconds = interleaved(steps, settings.rounds, _synchronizer(settings.device))
    reference = seconds[f"{REFERENCE} compiled"]
    return [
        {
            "d_model": d_model,
            "block": label,
            "mode": mode,
            "time_ratio": ratio(seconds[f"{label} {mode}"], reference),
            "seconds": sorted(seconds[f"{label} {mode}"])[settings.rounds // 2],
            "saved_bytes": kept[label, mode],
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


def _synchronizer(device: str) -> Callable[[], object]:
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None
