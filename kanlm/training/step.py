"""One update on the global batch: forward, backward, callbacks, clipping, the guard, the optimizer.

The loss is the sum over a rank's tokens divided by the tokens of the global batch, so that
neither the number of micro-batches nor of ranks changes the gradient.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from kanlm.config import TrainingSettings
from kanlm.errors import UserError
from kanlm.faults import fault_point
from kanlm.kan.casts import cast_once
from kanlm.kan.sharding import gathered
from kanlm.training.compilation import compile_seconds
from kanlm.training.distributed import reported_by_other_rank, sum_over_ranks
from kanlm.training.metrics import Accumulator
from kanlm.training.optimizer import set_learning_rate
from kanlm.training.schedule import learning_rate_ratio
from kanlm.training.sharding import gradient_sync
from kanlm.training.stopping import EXIT_CODES, agreed_exit_code

if TYPE_CHECKING:
    from kanlm.training.callbacks import Batch, Callback
    from kanlm.training.trainer import Trainer

#: Losses with which a new one is compared, and how many there must be.
GUARD_WINDOW, GUARD_MINIMUM = 128, 32


def train_step(trainer: "Trainer") -> None:
    """Take one update, or skip it where the loss or the gradient is not finite."""
    started, compiled = time.perf_counter(), compile_seconds()
    state, accelerator = trainer.state, trainer.accelerator
    with trainer.phases.of("data"):
        rank, ranks = accelerator.process_index, accelerator.num_processes
        batch = trainer.batch(state.step, rank, ranks)
    tokens = compute_gradients(trainer, batch, trainer.accumulator)
    _add_penalties(trainer)
    for callback in trainer.callbacks:
        callback.gradients(trainer.model)
    norm = _clip(trainer)
    trainer.accumulator.add("gradient_norm", norm)
    trainer.accumulator.add("tokens", tokens)
    loss, norms = _agree(trainer, norm)
    fault_point("before-update")
    taken, unusual = state.guard.should_take(loss, norms, trainer.config.training)
    if taken:
        _update(trainer)
    trainer.placement.wrapped_optimizer.zero_grad(set_to_none=True)
    state.step += 1
    seconds = time.perf_counter() - started
    trainer.accumulator.end_step(seconds, taken=taken)
    state.seconds += seconds
    state.compile_seconds += compile_seconds() - compiled
    if unusual is not None:
        _report_unusual(trainer, unusual, taken)


def compute_gradients(
    trainer: "Trainer", batch: "Batch", accumulator: Accumulator | None = None
) -> Tensor:
    """Leave the gradient of the mean loss over the global batch in every `parameter.grad`.

    Args:
        batch: this rank's rows, on the CPU.
        accumulator: takes the loss and its terms; None leaves the terms of callbacks out.

    Returns: the tokens of the global batch, ().
    """
    accelerator = trainer.accelerator
    callbacks = [] if accumulator is None else trainer.callbacks
    options: dict[str, Any] = {**trainer.forward_options} if callbacks else {}
    with trainer.phases.of("data"):
        batch = _to_device(batch, accelerator.device)
    tokens = sum_over_ranks(accelerator, (batch["shift_labels"] != -100).sum())
    options["num_items_in_batch"] = tokens
    model = trainer.placement.wrapped_model
    rows = batch["input_ids"].shape[0]
    size = trainer.config.training.micro_batch_size or rows
    with cast_once():
        for start in range(0, rows, size):
            micro = {key: value[start : start + size] for key, value in batch.items()}
            with gradient_sync(accelerator, model, start + size >= rows):
                with trainer.phases.of("forward"), accelerator.autocast():
                    output = model(**micro, **options)
                    loss, auxiliary_loss = output.loss, output.auxiliary_loss
                    terms = loss_terms(callbacks, micro, output, tokens)
                # Logits are as large as anything, and backward has no use for them.
                del output
                # Backward is two products where forward is one.
                if accumulator is not None:
                    trainer.show((start + (min(start + size, rows) - start) / 3) / rows)
                with trainer.phases.of("backward"):
                    total = sum(terms.values(), start=loss)
                    # Gradients are averaged over ranks; the loss is a share of a sum.
                    accelerator.backward(total * accelerator.num_processes)
            if accumulator is not None:
                accumulator.add("loss", loss.detach())
                if auxiliary_loss is not None:
                    accumulator.add("loss", -auxiliary_loss.detach())
                    accumulator.add("auxiliary_loss", auxiliary_loss.detach())
                for name, term in terms.items():
                    accumulator.add(name, term.detach())
    return tokens


def loss_terms(
    callbacks: Sequence["Callback"], micro: "Batch", output: Any, tokens: Tensor
) -> dict[str, Tensor]:
    """What callbacks add to a micro-batch's loss, by its part of the global batch's tokens."""
    terms: dict[str, Tensor] = {}
    for callback in callbacks:
        term = callback.loss(micro, output)
        if term is not None:
            share = (micro["shift_labels"] != -100).sum().double() / tokens
            terms[f"loss/{callback.name}"] = term * share.to(term.dtype)
    return terms


def _to_device(batch: "Batch", device: torch.device) -> dict[str, Tensor]:
    """Copy without waiting for the device, for which a GPU needs pinned memory."""
    if device.type == "cuda":
        batch = {key: value.pin_memory() for key, value in batch.items()}
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def _add_penalties(trainer: "Trainer") -> None:
    """Add the gradients of the callbacks' penalties to the loss's.

    They depend on the weights alone, which are the same on all ranks and in all micro-batches:
    so they come once, after gradients have been averaged.
    """
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    for callback in trainer.callbacks:
        term = callback.penalty(trainer.model)
        if term is None:
            continue
        total = gathered(term)
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                before = parameter.grad
                parameter.grad = gradient if before is None else before.add_(gradient)
        own = callback.name == "penalty"
        trainer.accumulator.add("penalty" if own else f"penalty/{callback.name}", total.detach())


def _clip(trainer: "Trainer") -> Tensor:
    """Clip the gradients, and return their norm before that."""
    clip = trainer.config.training.gradient_clip
    norm = trainer.accelerator.clip_grad_norm_(
        trainer.placement.wrapped_model.parameters(), math.inf if clip is None else clip
    )
    assert norm is not None
    # Where nothing has a gradient it is a 0 on the CPU.
    return gathered(norm).to(trainer.accelerator.device)


def _agree(trainer: "Trainer", norm: Tensor) -> tuple[float, float]:
    """The global batch's loss and the sum of all ranks' `norm`.

    Ranks also agree on a stop, and on whether a checkpoint is written. One all-reduce a step,
    for which the device is waited for: what is not finite on one rank is so on all
    afterwards, and they stop after the same step.
    """
    own = torch.stack([trainer.accumulator.step_loss, norm.double()])
    stops = (trainer.stop.exit_code == code for code in EXIT_CODES)
    flags = torch.tensor(
        [trainer.checkpointer.writer.written, *stops], dtype=torch.float64, device=own.device
    )
    figures = sum_over_ranks(trainer.accelerator, torch.cat([own, flags]))
    loss, norms, written, *stopping = figures.tolist()
    trainer.all_written = written == trainer.accelerator.num_processes
    trainer.stop_agreed = agreed_exit_code(stopping)
    return loss, norms


def _update(trainer: "Trainer") -> None:
    """Let the optimizer step, with the callbacks around it."""
    training, schedule = trainer.config.training, trainer.config.schedule
    ratio = learning_rate_ratio(schedule, trainer.state.step, training.steps)
    set_learning_rate(trainer.optimizer, trainer.config.optimizer.learning_rate * ratio)
    with trainer.phases.of("update"):
        for callback in trainer.callbacks:
            callback.before_update()
        trainer.placement.wrapped_optimizer.step()
        for callback in reversed(trainer.callbacks):
            callback.after_update()


def _report_unusual(trainer: "Trainer", unusual: str, taken: bool) -> None:
    """Log a step that was skipped or is a spike, and give up after too many in a row."""
    step, guard, training = trainer.state.step, trainer.state.guard, trainer.config.training
    trainer.record("unusual", {"what": unusual, "skipped": not taken})
    trainer.tracker.print_line(f"step {step}: {unusual}{'' if taken else '; the step is skipped'}")
    if guard.skipped_in_a_row < training.max_skipped_steps:
        return
    # The last good checkpoint may be on its way yet.
    trainer.checkpointer.finish()
    error = UserError(
        f"step {step}: {unusual}; {guard.skipped_in_a_row} steps in a row were skipped "
        "(training.max_skipped_steps), the last good checkpoint is kept; try a lower "
        "optimizer.learning_rate or training.gradient_clip, or look at the text there"
    )
    raise error if trainer.accelerator.is_main_process else reported_by_other_rank(error)


@dataclass
class StepGuard:
    """Decides which steps are skipped: the loss or gradient is no number, or the loss leaps.

    A skipped step changes neither weights nor moments; the next one has the next batch and the
    next learning rate. All ranks see the same sums, and so decide alike. A part of checkpoints.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    #: Steps skipped, in all and since the last that was taken.
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    loss_spikes: int = 0
    #: Of the newest steps, where finite.
    losses: list[float] = field(default_factory=list)

    def should_take(
        self, loss: float, gradient_norm: float, training: TrainingSettings
    ) -> tuple[bool, str | None]:
        """Whether to take the step, and what is unusual about it, in words.

        Args:
            loss: of the global batch.
            gradient_norm: before clipping; any number that is finite where it is.
        """
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            return self._skip(f"the loss is {loss}, the gradient's norm {gradient_norm}")
        above = self._deviations_above(loss)
        self.losses = [*self.losses, loss][-GUARD_WINDOW:]
        threshold = training.loss_spike_deviations
        if threshold is None or above <= threshold:
            self.skipped_in_a_row = 0
            return True, None
        self.loss_spikes += 1
        unusual = f"the loss is {loss:.4f}, {above:.1f} standard deviations above those before"
        if training.skip_loss_spikes:
            return self._skip(unusual)
        self.skipped_in_a_row = 0
        return True, unusual

    def _skip(self, unusual: str) -> tuple[bool, str]:
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        return False, unusual

    def _deviations_above(self, loss: float) -> float:
        if len(self.losses) < GUARD_MINIMUM:
            return 0.0
        deviation = statistics.stdev(self.losses)
        return (loss - statistics.fmean(self.losses)) / deviation if deviation else 0.0
