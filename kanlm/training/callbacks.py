"""The moments of a run, and what may happen at them.

A `Callback` is a class with a method for each moment that it cares about. The loop's own parts
are callbacks (grids, penalties, log lines, validation, polish, samples), and so is whatever a
user adds: `kanlm.train(config, callbacks=[Replay(...)])`.

    start                   model and optimizer are placed
    (a checkpoint is loaded, if there is one)
    before_step             of every step
      batch                 choose or change the batch
      loss                  add a term of a micro-batch's outputs
      penalty               add a term of the weights
      gradients             change what has been averaged over all ranks, before it is clipped
      before_update         around the optimizer's step
      after_update
      after_step
      after_validation      where one was made
    finish                  after the last step; the model may be changed once more

Callbacks are called in the order of their list, after the loop's own; `after_update` in the reverse
order. `trainer.state.step` counts updates done: up to `after_update` it is the number of the step
in progress, in `after_step` one more. All ranks call all methods at the same moments, so
collectives are allowed everywhere.

What a callback keeps from step to step is its `state_dict`, a part of checkpoints. What `finish`
returns is kept in the run's folder, where the run that is fine-tuned from it finds it.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from kanlm.model import KanLMForCausalLM
    from kanlm.training.checkpointing.callback_state import PreviousState
    from kanlm.training.trainer import Trainer

#: Of a model's forward: `input_ids` and `shift_labels`, (rows, context_length), and more.
Batch = Mapping[str, Tensor]


class Callback:
    """Base class: what happens at the moments of a run, which is nothing unless overridden.

    Attributes:
        trainer: the run, from before `start` on: `trainer.model` (without wrappers),
            `trainer.optimizer`, `trainer.config`, `trainer.batches`, `trainer.corpora`,
            `trainer.state.step` (updates done), `trainer.accelerator`, and
            `trainer.record(kind, values)`, which writes a line of metrics.jsonl.
        name: what the state is stored under, unique within a run; the class's name if not set.
        needs_logits: whether `loss` reads `outputs.logits`, which the model otherwise never
            makes in whole.
    """

    trainer: "Trainer"
    needs_logits: bool = False
    name: str

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in vars(cls):
            cls.name = cls.__name__

    def start(self, previous: "PreviousState | None") -> None:
        """Model and optimizer are placed, with the weights that training starts from.

        In a resumed run, too, before its checkpoint is loaded: tensors of the state are made here,
        of the shapes and placements that they will have, and then filled.

        Args:
            previous: what `finish` of a callback of this name returned at the end of the run that
                this one is fine-tuned from; None if there is none.
        """

    def before_resume(self, step: int) -> None:
        """A checkpoint of `step` updates is about to be loaded: take the shapes of that time."""

    def before_step(self) -> None:
        """Before the batch of update `trainer.state.step` (0 for the first) is made."""

    def batch(self, batch: Batch, step: int, rank: int, world_size: int) -> Batch:
        """Return the rows of the batch of `step` that belong to `rank`, `batch` or others.

        May be called several times for a step, and for another rank and world size than there
        are, so it must depend on its arguments and the state alone and must not change the state;
        `after_step` may.

        Args:
            batch: `input_ids` and `shift_labels`, (rows, context_length) int64 on the CPU;
                labels of −100 are not trained on.
            step: 0 for the first.
        """
        return batch

    def loss(self, batch: Batch, outputs: Any) -> Tensor | None:
        """Return a term to add to the loss of a micro-batch, (), or None.

        It must be a mean over the micro-batch's tokens. It counts by the micro-batch's part of the
        global batch's tokens, so that neither micro-batches nor ranks change the sum. What depends
        on the weights alone is a `penalty`.

        Args:
            batch: the micro-batch, on the device.
            outputs: of the model, `outputs.loss` among them.
        """
        return None

    def penalty(self, model: "KanLMForCausalLM") -> Tensor | None:
        """Return a term of the weights to add to the loss, (), or None.

        Called once a step, after gradients have been averaged: all ranks return the same. With
        FSDP parameters are DTensors, and so may be the term.
        """
        return None

    def gradients(self, model: "KanLMForCausalLM") -> None:
        """Change `parameter.grad`, averaged over all ranks and not yet clipped."""

    def before_update(self) -> None:
        """The optimizer is about to step; gradients are clipped. Not called for skipped steps."""

    def after_update(self) -> None:
        """The optimizer has stepped, decay included; gradients are still there."""

    def after_step(self) -> None:
        """The step is over, taken or skipped. May call `trainer.check_stop()` while nothing has
        changed yet: then a stop leaves this call and those of later callbacks to the resumed run.
        """

    def after_validation(self, figures: Sequence[Mapping[str, Any]]) -> None:
        """A validation is over.

        Args:
            figures: `domain`, `nats_per_token`, `bits_per_byte`, `token_perplexity` of each
                domain, the one trained on first.
        """

    def finish(self, model: "KanLMForCausalLM") -> Mapping[str, Any] | None:
        """Training is over; what is done to `model` in place is evaluated and exported.

        Returns:
            What the run that will be fine-tuned from this one finds as `previous` in `start`:
            tensors and values by name, as of `state_dict`; `trainer.batches` and
            `trainer.compute_gradients` may serve to make them. Or None.
        """
        return None

    def parameters_replaced(self, matrices: Mapping[str, Tensor]) -> None:
        """Grids have changed: parameters are new, coefficients in `matrices` of another shape.

        A callback whose state holds tensors must override this where grids change in training.

        Args:
            matrices: parameter's name → (in, new B, B), which maps the old coefficients to the
                new ones.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: tensors, and values that JSON can hold, by name.

        From `start` on it has the same names, and its tensors the same shapes and placements: the
        same on all ranks, or DTensors placed as a parameter is.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of a checkpoint.

        Args:
            state: as of `state_dict`. Its tensors are those that `state_dict` returned before,
                already filled in place.
        """
