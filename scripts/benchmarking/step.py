"""Time of a whole model's training step: forward, backward, clipping and the optimizer.

1. Models differ in their feed-forward blocks alone, which have equal parameters.
2. All models take turns on the same random tokens; each mode, eager and compiled, by itself.
3. Every model is compared with the SwiGLU one of the same mode, its usual twin, and so is
   transformers' Llama of the same shape.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarking.blocks import LLAMA, llama, matched_spec
from benchmarking.measure import interleaved, ratio, synchronizer, warn_of_scalar_code
from benchmarking.report import Results, markdown_table, rules, where
from kanlm.config import OptimizerSettings
from kanlm.kan.kernels import Backend, use_backend
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.accounting import account
from kanlm.reporting.format import count, duration, fixed, span
from kanlm.reporting.table import Table
from kanlm.training.optimizer import build_optimizer


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A training step of a whole model."""

    d_model: int = 512
    n_layers: int = 4
    n_heads: int = 8
    vocab_size: int = 8192
    context_length: int = 512
    batch_size: int = 4
    precision: Literal["fp32", "bf16"] = "fp32"
    #: Blocks beside SwiGLU, which all are compared with.
    blocks: tuple[Any, ...] = ("gelu", "kan", "kan-local")
    modes: tuple[Literal["eager", "compiled"], ...] = ("eager", "compiled")
    #: What adds up the edges' functions of all blocks (kanlm.kan.kernels).
    backend: Backend = "auto"
    rounds: int = 7
    device: str = "cpu"
    output_dir: str = "runs/bench/step"


# Measuring


#: What all models are compared with.
TWIN = "swiglu"


def measure(settings: Settings, report: Callable[[str], object]) -> list[dict]:
    """Return one row a mode and block: time over the SwiGLU model's, tokens a second, FLOPs.

    Raises:
        UserError: a block is unknown or has no width of equal parameters.
    """
    rows = []
    for mode in settings.modes:
        report(mode)
        if mode == "compiled":
            warn_of_scalar_code(settings.device, report)
        with use_backend(settings.backend):
            rows += _measure_mode(settings, mode)
    return rows


def _measure_mode(settings: Settings, mode: str) -> list[dict]:
    torch._dynamo.reset()
    configs = {}
    for spec in (TWIN, *settings.blocks):
        config = _config(settings, spec)
        configs[account(config).feed_forward] = config
    ids = torch.randint(
        settings.vocab_size,
        (settings.batch_size, settings.context_length),
        generator=torch.Generator().manual_seed(0),
    ).to(settings.device)
    # Llama computes a loss where there are labels, and takes the shifted ones where given.
    batch = {"input_ids": ids, "labels": ids, "shift_labels": ids.roll(-1, dims=1)}
    steps = {
        label: _make_step(settings, KanLMForCausalLM(c), mode, batch)
        for label, c in configs.items()
    }
    twin = next(iter(configs))
    configs[LLAMA] = configs[twin]
    steps[LLAMA] = _make_step(settings, llama(configs[twin]), mode, batch)
    seconds = interleaved(steps, settings.rounds, synchronizer(settings.device))
    rows = []
    for label, config in configs.items():
        counts = account(config)
        median = sorted(seconds[label])[settings.rounds // 2]
        rows.append(
            {
                "mode": mode,
                "block": label,
                "time_ratio": ratio(seconds[label], seconds[twin]),
                "speed_ratio": ratio(seconds[twin], seconds[label]),
                "time_over_llama": ratio(seconds[label], seconds[LLAMA]),
                "seconds": median,
                "tokens_per_second": ids.numel() / median,
                "parameters": counts.parameters["total"],
                "flops": counts.training_flops_per_token * ids.numel(),
            }
        )
    return rows


def _config(settings: Settings, spec: Any) -> KanLMConfig:
    return KanLMConfig(
        vocab_size=settings.vocab_size,
        d_model=settings.d_model,
        n_layers=settings.n_layers,
        n_heads=settings.n_heads,
        context_length=settings.context_length,
        feed_forward=matched_spec(spec, settings.d_model),
        dropout=0.0,
    )


def _make_step(
    settings: Settings, model: nn.Module, mode: str, batch: dict[str, Tensor]
) -> Callable[[], None]:
    nn.Module.to(model.train(), settings.device)
    optimizer = build_optimizer(model, OptimizerSettings())
    if mode == "compiled":
        model.compile()
    return functools.partial(_step, settings, model, optimizer, batch)


def _step(
    settings: Settings,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
) -> None:
    device = torch.device(settings.device).type
    with torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bf16"):
        loss = model(**batch, num_items_in_batch=batch["input_ids"].numel()).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# Showing


def tables(results: Results) -> list[Table]:
    """Tabulate a row a mode and block."""
    settings = results["settings"]
    groups = [where(results, mode=mode) for mode in settings["modes"]]

    def cells(row: Results) -> list[str]:
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


def section(results: Results) -> str:
    """Return the benchmark's part of the page, in Markdown."""
    settings = results["settings"]
    rows = [
        [
            row["block"],
            row["mode"],
            fixed(row["speed_ratio"]["median"], 2),
            *([fixed(row["time_over_llama"]["median"], 2)] if "time_over_llama" in row else []),
            count(row["tokens_per_second"]),
            count(row["flops"] / row["seconds"], "FLOP/s"),
        ]
        for row in results["rows"]
    ]
    beside = ["× Llama's time"] if "time_over_llama" in results["rows"][0] else []
    heads = ["blocks", "mode", "× SwiGLU's tokens/s", *beside, "tokens/s", "multiply-adds ×2"]
    return (
        f"**A training step of a whole model** with AdamW: {settings['n_layers']} layers, d_model "
        f"{settings['d_model']}, vocabulary {settings['vocab_size']:,}, {settings['batch_size']} × "
        f"{settings['context_length']} tokens, beside the SwiGLU model of the same mode.\n\n"
        + markdown_table(heads, rows)
    )
