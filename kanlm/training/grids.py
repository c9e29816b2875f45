"""Grids that change while a model trains: when, and what becomes of the optimizer.

Coarse-to-fine training starts on a small grid and splits its cells later in training
(Liu et al., arXiv 2404.19756, §2.4). The function stays as it is at each refinement, and
the optimizer's moments are mapped with the coefficients, so that training continues as if
nothing had happened.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kanlm.config import TrainingSettings
from kanlm.faults import fault_point
from kanlm.kan.grid import Refit, refine_moments
from kanlm.model import KanLMForCausalLM
from kanlm.model.grids import adapt_model, first_sequences, refine_model
from kanlm.training.callbacks import Callback
from kanlm.training.metrics import Accumulator

if TYPE_CHECKING:
    from kanlm.training.trainer import Trainer


class GridChanges(Callback):
    """Refines grids by `training.grid_schedule`, and moves them at `grid_adaptation_steps`."""

    def before_resume(self, step: int) -> None:
        """Refine as far as the run had when it wrote the checkpoint, which is then loaded."""
        schedule = self.trainer.config.training.grid_schedule
        if schedule is None:
            return
        # A checkpoint is written before grids change.
        size = grid_size_at(schedule, max(step - 1, 0))
        if size != schedule[0]:
            replace_parameters(self.trainer, lambda model: refine_model(model, size))

    def before_step(self) -> None:
        """Refine or move grids where that is due before this update."""
        trainer, state, training = self.trainer, self.trainer.state, self.trainer.config.training
        size, adapts = changes_at(training, state.step)
        if size is not None:
            replace_parameters(trainer, lambda model: refine_model(model, size))
            if training.early_stopping_patience is not None:
                # The best model so far has another shape, and cannot be gone back to.
                state.best_loss, state.stale_validations = None, 0
            trainer.tracker.print_line(f"step {state.step}: grids refined to {size} cells")
        if adapts:
            self._adapt()

    def _adapt(self) -> None:
        """Move the grids to the inputs of the next batch, the same sequences on every rank."""
        trainer, step = self.trainer, self.trainer.state.step
        batch = first_sequences(trainer.batch(step, 0, 1), trainer.accelerator.device)
        share = trainer.config.training.grid_uniform_share
        refits: dict[str, Refit] = {}

        def adapt(model: KanLMForCausalLM) -> dict[str, Tensor]:
            refits.update(adapt_model(model, batch, uniform_share=share))
            return {name: refit.matrix for name, refit in refits.items()}

        replace_parameters(trainer, adapt)
        errors = {f"{name}/refit_error": refit.error for name, refit in refits.items()}
        # Of the next step, in which it happens.
        trainer.record("grid", errors, step=step + 1)
        worst = max(errors.values())
        trainer.tracker.print_line(f"step {step}: grids moved, relative error at most {worst:.1e}")


def replace_parameters(
    trainer: "Trainer", change: Callable[[KanLMForCausalLM], Mapping[str, Tensor]]
) -> None:
    """Give the model new parameters, and carry the optimizer's state over.

    The one place where shapes change: the optimizer is made anew around its old state, and the
    model wrapped and compiled anew.

    Args:
        change: changes a whole model, and returns name of each new parameter → the matrix that
            made it of the old.
    """
    window, placement = trainer.accumulator.read(), trainer.placement
    model, optimizer = placement.whole()
    before = dict(model.named_parameters())
    matrices = change(model)
    fault_point("inside-grid-change")
    carried = carry_optimizer(
        optimizer,
        before,
        model,
        placement.build_optimizer,
        matrices,
        trainer.config.optimizer.epsilon,
    )
    placement.replace(model, carried)
    trainer.accumulator = Accumulator(model, trainer.accelerator, window)
    for callback in trainer.callbacks:
        callback.parameters_replaced(matrices)


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

    Args:
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
