"""The training loop, for pretraining and fine-tuning alike.

`train()` reads as the life of a run; one update is in `step.py`, and what else happens in
callbacks. The loop owns what Accelerate does not keep exactly: the data cursor (an integer,
because the batch is a function of seed and step), the learning rate (a function of the step),
checkpoints and random states.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from kanlm.config import Config
from kanlm.data.corpus import Corpus
from kanlm.data.loader import Batches
from kanlm.errors import Interrupted
from kanlm.faults import fault_point
from kanlm.model import KanLMForCausalLM
from kanlm.slow_notices import announce_if_slow
from kanlm.training.callbacks import Batch, Callback
from kanlm.training.checkpointing.callback_state import check_callbacks, previous_state
from kanlm.training.checkpointing.checkpointer import Checkpointer
from kanlm.training.distributed import run_on_main, sum_over_ranks, tear_down
from kanlm.training.metrics import Accumulator, PhaseTimer, Window
from kanlm.training.placement import Placement
from kanlm.training.progress import Pace, parts_left
from kanlm.training.sharding import reshard
from kanlm.training.state import TrainingState
from kanlm.training.step import compute_gradients, train_step
from kanlm.training.stopping import EXIT_CODES, Stop, StopRequested, agreed_exit_code
from kanlm.training.tracking import Tracker


class Trainer:
    """One run's model, optimizer and data, and the loop over them.

    Args:
        config: the resolved configuration.
        accelerator: places the model and talks to other ranks.
        model: a causal language model whose forward takes `shift_labels` and
            `num_items_in_batch` and returns a `loss`, of which `auxiliary_loss`, if not
            None, is the part that is not the language model's.
        batches: `batch(step, rank, world_size)` of the text trained on.
        corpora: domain → its text, the one trained on first.
        callbacks: in the order in which they are called.
        stop: says when to.

    Raises:
        UserError: no checkpoint is intact, or the one to resume from is of another model, text
            or other callbacks.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        model: KanLMForCausalLM,
        batches: Batches,
        corpora: Mapping[str, Corpus],
        callbacks: Sequence[Callback],
        stop: Stop,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.batches = batches
        self.corpora = corpora
        self.callbacks = callbacks
        self.stop = stop
        self.folder = Path(config.output_dir)
        self.phases = PhaseTimer(accelerator.device)
        self.stop_agreed: int | None = None
        self.all_written = False
        self.state = TrainingState(tokens_hash=corpora[config.data.domain].tokens_hash)
        self.placement = Placement(config, accelerator, model)
        self.accumulator = Accumulator(model, accelerator, Window())
        for callback in callbacks:
            callback.trainer = self
            callback.start(previous_state(config.initialize_from, callback.name))
        check_callbacks(callbacks, config.training)
        self.checkpointer = Checkpointer(self)
        self.checkpointer.resume()

    @property
    def model(self) -> KanLMForCausalLM:
        """The model without wrappers."""
        return self.placement.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without wrappers."""
        return self.placement.optimizer

    def train(self) -> None:
        """Run the remaining steps.

        Raises:
            Interrupted: after saving, on a signal or where the time limit is over.
            UserError: nothing can be written, the text has changed, or too many steps in a
                row had to be skipped.
        """
        self.tracker = Tracker(
            self.folder,
            self.config,
            main=self.accelerator.is_main_process,
            step=self.state.step,
            lines=self.state.metrics_lines,
            wandb_id=self.state.wandb_id,
        )
        self.pace = Pace(self.state.seconds / self.state.step if self.state.step else None)
        self.update_began = time.perf_counter()
        with ExitStack() as stack:

            def start() -> None:
                stack.enter_context(self.tracker)

            run_on_main(self.accelerator, start)
            stack.enter_context(self.stop.catching_signals(self.tracker.print_line))
            stack.callback(self.checkpointer.writer.abandon)
            if self.state.pending is not None:
                self._after_step()
            first = announce_if_slow(
                "making the first update, which may compile kernels", self.tracker.print_line
            )
            while not self.finished:
                self.update_began = time.perf_counter()
                self.show()
                with first:
                    for callback in self.callbacks:
                        callback.before_step()
                    train_step(self)
                first = nullcontext()
                self.pace.add("update", time.perf_counter() - self.update_began)
                fault_point("between-optimizer-and-log")
                self.state.pending = self.callbacks[0].name
                self._after_step()
            self.show()
            self.checkpointer.finish()
        if self.config.training.early_stopping_patience is not None:
            self.checkpointer.load_best()
        fault_point("after-training")

    def finish(self) -> None:
        """Let the callbacks finish the model, and write what they leave to a next run."""
        reshard(self.model)
        left = {callback.name: callback.finish(self.model) for callback in self.callbacks}
        self.checkpointer.write_left({name: state for name, state in left.items() if state})

    def leave(self) -> None:
        """Tear down what ranks have in common; the model remains, without wrappers.

        Left to the exit of the process, gloo's threads now and then abort it. The wrapper goes
        first: were it the last to hold the process group, it would wait for those threads
        while it keeps Python's lock from them (pytorch/pytorch#56297).
        """
        self.placement.release()
        tear_down(self.accelerator)

    # What callbacks may ask for

    def batch(self, step: int, rank: int, world_size: int) -> Batch:
        """The rows of a batch that belong to a rank, as callbacks would have them."""
        batch: Batch = self.batches.batch(step, rank, world_size)
        for callback in self.callbacks:
            batch = callback.batch(batch, step, rank, world_size)
        return batch

    def compute_gradients(self, batch: Batch) -> None:
        """Leave the language model's gradient of a batch in every `parameter.grad`.

        It is that of the mean loss over all ranks' rows, averaged, without terms of callbacks.

        Args:
            batch: this rank's rows.
        """
        compute_gradients(self, batch)

    def record(self, kind: str, values: Mapping[str, Any], *, step: int | None = None) -> None:
        """Write a line of metrics.jsonl, all ranks together: where it fails, all of them end.

        Args:
            kind: what the line is.
            values: numbers and strings by name.
            step: updates done; None is the present step.
        """
        at = self.state.step if step is None else step
        run_on_main(self.accelerator, lambda: self.tracker.log(kind, at, dict(values)))

    def due(self, every: int | None) -> bool:
        """Whether what is done every so many steps is due after this one."""
        return every is not None and self.state.step % every == 0

    @property
    def is_last(self) -> bool:
        """Whether the last of `training.steps` is done."""
        return self.state.step == self.config.training.steps

    @property
    def finished(self) -> bool:
        """Whether no step is left, by number or by early stopping."""
        patience = self.config.training.early_stopping_patience
        return self.state.step >= self.config.training.steps or (
            patience is not None and self.state.stale_validations >= patience
        )

    @property
    def forward_options(self) -> dict[str, Any]:
        """Options of the model's forward in training, in addition to batch and token count."""
        wanted = any(callback.needs_logits for callback in self.callbacks)
        return {"skip_logits": False} if wanted else {}

    def check_stop(self) -> None:
        """Leave what is being done to the resumed run, if a stop is wanted and can be saved for.

        All ranks must ask at once.

        Raises:
            StopRequested: caught by the loop, which saves and stops.
        """
        if self.accelerator.num_processes > 1:
            flags = [self.stop.exit_code == code for code in EXIT_CODES]
            own = torch.tensor(flags, dtype=torch.float64, device=self.accelerator.device)
            self.stop_agreed = agreed_exit_code(sum_over_ranks(self.accelerator, own).tolist())
        if self._stop_requested() is not None and not self.state.guard.skipped_in_a_row:
            raise StopRequested

    def show(self, share: float = 0.0) -> None:
        """Show how far training is and how long it will take.

        Args:
            share: of the present update that is done.
        """
        if share and self.phases.on_gpu:
            # Python is ahead of the device there.
            return
        step, begun = self.state.step, time.perf_counter() - self.update_began
        left = parts_left(self.config.training, step)
        self.tracker.show(step + share, self.pace.seconds_left(left, begun=begun, share=share))

    # After a step

    def _after_step(self) -> None:
        """Call what is pending of the callbacks' `after_step`, then save and stop where due.

        A stop does not wait for it: the resumed run does it first, to the same figures.
        """
        names = [callback.name for callback in self.callbacks]
        with suppress(StopRequested):
            while self.state.pending is not None:
                place = names.index(self.state.pending)
                self.callbacks[place].after_step()
                self.state.pending = names[place + 1] if place + 1 < len(names) else None
        self._save_and_stop()

    def _save_and_stop(self) -> None:
        """Save and stop, where one is due, but not while steps are being skipped.

        What is saved then might be broken, and would push out what is not; but not the best.
        """
        stop, training = self._stop_requested(), self.config.training
        finished = self.finished and self.state.pending is None
        is_best = self.checkpointer.keeps_best and self.state.best_step == self.state.step
        if self.all_written:
            self.checkpointer.finish()
        if self.state.guard.skipped_in_a_row and not finished and not is_best:
            return
        if finished or self.due(training.checkpoint_every) or is_best or stop is not None:
            self.checkpointer.save()
        if stop is not None:
            self.checkpointer.finish()
            interrupted = Interrupted(stop)
            interrupted.reported_by_other_rank = not self.accelerator.is_main_process
            raise interrupted

    def _stop_requested(self) -> int | None:
        """The exit code if a stop is wanted; several ranks have agreed on it in the step."""
        if self.accelerator.num_processes == 1:
            return self.stop.exit_code
        return self.stop_agreed
