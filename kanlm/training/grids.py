"""Grids that change while a model trains: when, and what becomes of the optimizer.

Coarse-to-fine training starts on a small grid and splits its cells as training goes on
(Liu et al., arXiv 2404.19756, §2.4). The function stays as it is at each refinement, and
the optimizer's moments are mapped with the coefficients, so that training goes on as if
nothing had happened.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from kanlm.config import TrainingSettings
from kanlm.kan.grid import refine_moments


def grid_size_at(schedule: Mapping[int, int], step: int) -> int:
    """Grid size of update `step` (0 for the first): that of the last entry not after it."""
    return schedule[max(start for start in schedule if start <= step)]


def changes_at(training: TrainingSettings, step: int) -> tuple[int | None, bool]:
    """What changes before update `step`: the new grid size or None, and whether grids adapt."""
    schedule = training.grid_schedule
    size = schedule[step] if schedule and step and step in schedule else None
    return size, step in training.grid_adaptation_steps


def carry_optimizer(
    old: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    model: nn.Module,
    build: Callable[[nn.Module], torch.optim.Optimizer],
    matrices: Mapping[str, Tensor],
    epsilon: float,
) -> torch.optim.Optimizer:
    """A new optimizer for a model some of whose parameters are new, with the old one's state.

    Moments of coefficients in `matrices` are mapped by `refine_moments`; all others, and
    step counts, are taken over.

    Arguments:
        old: the optimizer so far.
        parameters: the model's parameters by name when `old` was built.
        model: the model as it is now.
        build: makes an optimizer over a model's parameters.
        matrices: name of a new parameter → its matrix.
        epsilon: AdamW's ε.

    Raises:
        ValueError: a mapped parameter's state is not AdamW's.
    """
    new = build(model)
    for name, parameter in model.named_parameters():
        state = old.state.get(parameters[name])
        if not state:
            continue
        state = dict(state)
        if name in matrices:
            if not {"exp_avg", "exp_avg_sq"} <= state.keys():
                raise ValueError(f"the moments of {name} are not AdamW's and cannot be refined")
            state["exp_avg"], state["exp_avg_sq"] = refine_moments(
                matrices[name], state["exp_avg"], state["exp_avg_sq"], epsilon
            )
        new.state[parameter] = state
    return new
