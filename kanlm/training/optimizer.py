"""AdamW over named groups that cover the model exactly.

Coefficients of bases get a group of their own: they are neither ordinary matrices nor
gains, and the best rate and decay for them are a question that users sweep.
"""

import torch
from torch import nn

from kanlm.config import OptimizerSettings


def parameter_groups(model: nn.Module, settings: OptimizerSettings) -> list[dict]:
    """Split the model's trainable parameters into AdamW's groups.

    - `coefficients`: parameters named `coefficients`, with their own rate and decay;
    - `matrices`: everything else with two dimensions or more, embeddings included;
    - `vectors`: gains and biases, undecayed.

    `ratio` in each group is its rate over the scheduled one.

    Raises:
        RuntimeError: a trainable parameter is in no group, or in two.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    coefficients = [p for name, p in named if name.rsplit(".", 1)[-1] == "coefficients"]
    chosen = {id(p) for p in coefficients}
    others = [p for _, p in named if id(p) not in chosen]
    groups = [
        {
            "name": "matrices",
            "params": [p for p in others if p.ndim >= 2],
            "weight_decay": settings.weight_decay,
            "ratio": 1.0,
        },
        {
            "name": "coefficients",
            "params": coefficients,
            "weight_decay": settings.coefficients_weight_decay,
            "ratio": settings.coefficients_learning_rate_ratio,
        },
        {
            "name": "vectors",
            "params": [p for p in others if p.ndim < 2],
            "weight_decay": 0.0,
            "ratio": 1.0,
        },
    ]
    check_coverage(model, groups)
    return [group for group in groups if group["params"]]


def check_coverage(model: nn.Module, groups: list[dict]) -> None:
    """Raise RuntimeError, by name, unless each trainable parameter is in one group."""
    counts: dict[int, int] = {}
    for group in groups:
        for parameter in group["params"]:
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and counts.pop(id(parameter), 0) != 1:
            raise RuntimeError(f"parameter {name} is not in exactly one optimizer group")
    if counts:
        raise RuntimeError(f"{len(counts)} tensors in the optimizer are not trainable parameters")


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) over `parameter_groups`."""
    return torch.optim.AdamW(
        parameter_groups(model, settings),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group `learning_rate` times the group's own ratio."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["ratio"]
