"""Time of a whole model's training step: forward, backward, clipping and the optimizer.

1. Models differ in their feed-forward blocks alone, which have equal parameters.
2. All models take turns on the same random tokens; each mode, eager and compiled, by itself.
3. Every model is compared with the SwiGLU one of the same mode, its usual twin, and so is
   transformers' Llama of the same shape.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kanlm.config import OptimizerSettings
from kanlm.experiments.bench.blocks import matched_spec
from kanlm.experiments.bench.compiled import warn_of_scalar_code
from kanlm.experiments.bench.llama import LABEL, llama
from kanlm.experiments.bench.settings import StepBenchmark
from kanlm.experiments.bench.timing import interleaved, ratio, synchronizer
from kanlm.kan.kernels import use_backend
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.accounting import account
from kanlm.training.optimizer import build_optimizer

#: What all models are compared with.
TWIN = "swiglu"


def measure_step(settings: StepBenchmark, report: Callable[[str], object]) -> list[dict]:
    """One row a mode and block: time over the SwiGLU model's, tokens a second, FLOPs.

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


def _measure_mode(settings: StepBenchmark, mode: str) -> list[dict]:
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
    configs[LABEL] = configs[twin]
    steps[LABEL] = _make_step(settings, llama(configs[twin]), mode, batch)
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
                "time_over_llama": ratio(seconds[label], seconds[LABEL]),
                "seconds": median,
                "tokens_per_second": ids.numel() / median,
                "parameters": counts.parameters["total"],
                "flops": counts.training_flops_per_token * ids.numel(),
            }
        )
    return rows


def _config(settings: StepBenchmark, spec: Any) -> KanLMConfig:
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
    settings: StepBenchmark, model: nn.Module, mode: str, batch: dict[str, Tensor]
) -> Callable[[], None]:
    nn.Module.to(model.train(), settings.device)
    optimizer = build_optimizer(model, OptimizerSettings())
    if mode == "compiled":
        model.compile()
    return functools.partial(_step, settings, model, optimizer, batch)


def _step(
    settings: StepBenchmark,
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
