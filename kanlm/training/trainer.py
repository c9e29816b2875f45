"""The training loop, for pretraining and fine-tuning alike.

`train()` reads as the life of a run; `train_step()` is one update. The loop owns what
Accelerate does not keep exactly: the data cursor (an integer, because the batch is a
function of seed and step), the learning rate (a function of the step), checkpoints and
random states.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from kanlm.config import Config, check
from kanlm.data.loader import Batches
from kanlm.errors import Interrupted, UserError
from kanlm.faults import point
from kanlm.kan.casts import cast_once
from kanlm.kan.grid import Refit
from kanlm.kan.penalties import penalty
from kanlm.kan.sharding import gathered
from kanlm.model import KanLMForCausalLM
from kanlm.model.grids import adapt_model, first_sequences, occupancies, refine_model
from kanlm.patience import saying
from kanlm.training import checkpoint as checkpoints
from kanlm.training.compilation import compile_seconds
from kanlm.training.grids import carry_optimizer, changes_at, grid_size_at
from kanlm.training.health import Health
from kanlm.training.meter import Meter, Window
from kanlm.training.optimizer import learning_rates, set_learning_rate
from kanlm.training.phases import Phases
from kanlm.training.polish import coefficients, polish
from kanlm.training.processes import in_all, on_main, part, sum_over_processes, told_elsewhere
from kanlm.training.progress import Pace
from kanlm.training.saving import Saving
from kanlm.training.schedule import learning_rate_ratio
from kanlm.training.sharding import gathered_copy, place, reshard, shards, synchronised
from kanlm.training.stopping import EXIT_CODES, Stop
from kanlm.training.stored import load_weights
from kanlm.training.tracking import DUTIES, Duty, Tracker, say
from kanlm.training.updates import measured_update


@dataclass
class Progress:
    """What the loop must remember between steps, and a checkpoint between processes."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    step: int = 0
    #: The first of `DUTIES` that the last step may still have, where a stop came before it.
    pending: Duty | None = None
    tokens: int = 0
    #: Seconds in training steps and the polish: no evaluation, sampling, checkpoints or start.
    seconds: float = 0.0
    #: Of those, in compiling.
    compile_seconds: float = 0.0
    #: Nats per token of the last validation, and the least so far.
    last_loss: float | None = None
    best_loss: float | None = None
    best_step: int = 0
    stale_validations: int = 0
    wandb_id: str | None = None
    #: As of the last reading of the meter.
    window: Window = field(default_factory=Window)
    health: Health = field(default_factory=Health)
    #: Of the text trained on; a resumed run must have the same.
    data_hash: str = ""


class Trainer:
    """One run's model, optimizer and data, and the loop over them.

    Arguments:
        config: the resolved configuration.
        accelerator: places the model and talks to other processes.
        model: a causal language model whose forward takes `shift_labels` and
            `num_items_in_batch` and returns a `loss`, of which `auxiliary_loss`, if not
            None, is the part that is not the language model's.
        batches: `batch(step, rank, world_size)`.
        build_optimizer: makes the optimizer over a model's parameters.
        compile_model: compiles a model in place, or leaves it, as the settings say; called
            when shapes have changed.
        validate: evaluates the unwrapped model, returning one dictionary of figures a
            domain; the first is the domain trained on. It calls its second argument after
            every forward pass, which may raise to end it.
        sample: continues the prompt with the unwrapped model, calling its second argument
            before every token.
        tokens_per_byte: of the training text, to show the loss in bits per byte.
        peak_tokens_per_second: what all devices would train on if they did nothing else but
            multiply at their peak; None where nobody knows it, as on CPUs.
        data_hash: of the training text.
        check_data: raises UserError if the text has changed since it was opened.
        stop: says when to.
        folder: the run's folder.

    Raises:
        UserError: no checkpoint is intact, or the one to go on from is of another model, text
            or number of processes.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        model: KanLMForCausalLM,
        batches: Batches,
        *,
        build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        compile_model: Callable[[nn.Module], object],
        validate: Callable[[nn.Module, Callable[[], None]], list[dict[str, Any]]],
        sample: Callable[[nn.Module, Callable[[], None]], str],
        tokens_per_byte: float,
        peak_tokens_per_second: float | None,
        data_hash: str,
        check_data: Callable[[], None],
        stop: Stop,
        folder: Path,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.batches = batches
        self.validate = validate
        self.sample = sample
        self.tokens_per_byte = tokens_per_byte
        self.peak_tokens_per_second = peak_tokens_per_second
        self.phases = Phases(accelerator.device)
        self.update_norms: dict[str, torch.Tensor] = {}
        self.check_data = check_data
        self.stop = stop
        self.stop_agreed: int | None = None
        self.all_written = False
        self.folder = folder
        wanted = config.training.background_checkpoints
        background = wanted == "on" or (wanted == "auto" and accelerator.device.type != "cpu")
        self.saving = Saving(accelerator, folder / "checkpoints", background=background)
        self.state = Progress(data_hash=data_hash)
        self.build_optimizer = build_optimizer
        self.compile_model = compile_model
        self.penalty_weights = config.penalties.weights
        self._place(model, build_optimizer(model), Window())
        self._resume()

    def train(self) -> None:
        """Run the remaining steps.

        Raises:
            Interrupted: after saving, on a signal or where the time limit is over.
            UserError: nothing can be written, the text has changed, or too many steps in a
                row had to be left out.
        """
        self.tracker = self._tracker()
        self.pace = Pace(self.state.seconds / self.state.step if self.state.step else None)
        self.update_began = time.perf_counter()
        with ExitStack() as stack:

            def start() -> None:
                stack.enter_context(self.tracker)

            on_main(self.accelerator, start)
            stack.enter_context(self.stop.noted(self.tracker.note))
            stack.callback(self.saving.abandon)
            if self.state.pending is not None:
                rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
                self.latest_batch = self.batches.batch(self.state.step - 1, rank, ranks)
                self._attend()
            first = saying("making the first update, which may compile kernels", self.tracker.note)
            while not self._finished():
                self.update_began = time.perf_counter()
                self._show()
                with first:
                    self._change_grids()
                    self.train_step()
                first = nullcontext()
                self.pace.add("update", time.perf_counter() - self.update_began)
                self._after_step()
            self._show()
            self._finish_saving()
        if self.config.training.early_stopping_patience is not None:
            best = on_main(self.accelerator, self._best_checkpoint)
            reshard(self.bare_model)
            load_weights(self.bare_model, best)
        point("after-training")

    def leave(self) -> None:
        """Part from the other processes; the model remains, unwrapped.

        Left to the exit of the process, gloo's threads now and then abort it. The wrapper goes
        first: were it the last to hold the process group, it would wait for those threads
        while it keeps Python's lock from them (pytorch/pytorch#56297).
        """
        del self.model, self.optimizer
        self.accelerator.free_memory()
        gc.collect()
        part(self.accelerator)

    def _place(
        self, model: KanLMForCausalLM, optimizer: torch.optim.Optimizer, window: Window
    ) -> None:
        """Bring model and optimizer to the device, and wrap them for several processes."""
        self.model, self.optimizer = place(
            self.accelerator, model, optimizer, self.build_optimizer, self.config.training.sharding
        )
        self.bare_model = model
        self.meter = Meter(model, self.accelerator, window)

    def train_step(self) -> None:
        """One update on the global batch of this step.

        The loss is the sum over this process's tokens divided by the tokens of the global
        batch, so that neither the number of micro-batches nor of processes changes the
        gradient.
        """
        started, compiled = time.perf_counter(), compile_seconds()
        accelerator, training = self.accelerator, self.config.training
        with self.phases.of("data"):
            batch = self._to_device(
                self.batches.batch(
                    self.state.step, accelerator.process_index, accelerator.num_processes
                )
            )
        self.latest_batch: Mapping[str, torch.Tensor] = batch
        tokens = sum_over_processes(accelerator, (batch["shift_labels"] != -100).sum())

        rows = batch["input_ids"].shape[0]
        size = training.micro_batch_size or rows
        with cast_once():
            for start in range(0, rows, size):
                micro = {key: value[start : start + size] for key, value in batch.items()}
                last = start + size >= rows
                with synchronised(accelerator, self.model, last):
                    with self.phases.of("forward"), accelerator.autocast():
                        output = self.model(**micro, num_items_in_batch=tokens)
                    loss, auxiliary_loss = output.loss, output.auxiliary_loss
                    # Logits are as large as anything, and backward has no use for them.
                    del output
                    # Backward is two products where forward is one.
                    self._show((start + (min(start + size, rows) - start) / 3) / rows)
                    with self.phases.of("backward"):
                        # Gradients are averaged over processes; the loss is a share of a sum.
                        accelerator.backward(loss * accelerator.num_processes)
                self.meter.add("loss", loss.detach())
                if auxiliary_loss is not None:
                    self.meter.add("loss", -auxiliary_loss.detach())
                    self.meter.add("auxiliary_loss", auxiliary_loss.detach())
        if self.penalty_weights:
            self.meter.add("penalty", self._add_penalty())

        clip = training.gradient_clip if training.gradient_clip is not None else math.inf
        norm = accelerator.clip_grad_norm_(self.model.parameters(), clip)
        assert norm is not None
        norm = gathered(norm)
        self.meter.add("gradient_norm", norm)
        self.meter.add("tokens", tokens)
        loss, norms = self._shared_figures(norm)
        point("before-update")
        taken, unusual = self.state.health.judge(loss, norms, training)
        if taken:
            self._update()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        seconds = time.perf_counter() - started
        self.meter.end_step(seconds, taken=taken)
        self.state.seconds += seconds
        self.state.compile_seconds += compile_seconds() - compiled
        if unusual is not None:
            self._note_unusual(unusual, taken)

    def _to_device(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy without waiting for the device, for which a GPU needs pinned memory."""
        device = self.accelerator.device
        if device.type == "cuda":
            batch = {key: value.pin_memory() for key, value in batch.items()}
        return {key: value.to(device, non_blocking=True) for key, value in batch.items()}

    def _update(self) -> None:
        """Let the optimizer step, and before a log line measure how far."""
        set_learning_rate(self.optimizer, self.learning_rate)
        step, training = self.state.step + 1, self.config.training
        logged = step == training.steps or step % training.log_every == 0
        with self.phases.of("update"):
            if not logged:
                self.optimizer.step()
                return
            with measured_update(self._bare_optimizer) as self.update_norms:
                self.optimizer.step()

    def _shared_figures(self, norm: torch.Tensor) -> tuple[float, float]:
        """The global batch's loss and the sum of all processes' `norm`.

        They also agree on a stop, and on whether a checkpoint is written. One all-reduce a step,
        for which the device is waited for: what is not finite in one process is so in all
        afterwards, and they stop after the same step.
        """
        own = torch.stack([self.meter.step_loss, norm.double()])
        flags = [self.saving.written, *(self.stop.exit_code == code for code in EXIT_CODES)]
        figures = torch.cat([own, torch.tensor(flags, dtype=torch.float64, device=own.device)])
        loss, norms, written, *stops = sum_over_processes(self.accelerator, figures).tolist()
        self.all_written = written == self.accelerator.num_processes
        self.stop_agreed = _agreed(stops)
        return loss, norms

    def _note_unusual(self, unusual: str, taken: bool) -> None:
        """Log a step that was left out or is a spike, and give up after too many in a row."""
        step, health, training = self.state.step, self.state.health, self.config.training
        self._record("unusual", step, {"what": unusual, "skipped": not taken})
        self.tracker.note(f"step {step}: {unusual}{'' if taken else '; the step is left out'}")
        if health.skipped_in_a_row < training.max_skipped_steps:
            return
        # The last good checkpoint may be on its way yet.
        self._finish_saving()
        error = UserError(
            f"step {step}: {unusual}; {health.skipped_in_a_row} steps in a row were left out "
            "(training.max_skipped_steps), the last good checkpoint is kept; try a lower "
            "optimizer.learning_rate or training.gradient_clip, or look at the text there"
        )
        raise error if self.accelerator.is_main_process else told_elsewhere(error)

    def _change_grids(self) -> None:
        """Refine or move the splines' grids where that is due before the next update.

        The one place where shapes change. Coefficients are new parameters afterwards, so the
        optimizer is made anew around its old state, and the model wrapped and compiled anew.
        """
        training = self.config.training
        size, adapts = changes_at(training, self.state.step)
        if size is None and not adapts:
            return
        if size is not None:
            self._replace_parameters(lambda: refine_model(self.bare_model, size))
            if training.early_stopping_patience is not None:
                # The best model so far has another shape, and cannot be gone back to.
                self.state.best_loss, self.state.stale_validations = None, 0
            self.tracker.note(f"step {self.state.step}: grids refined to {size} cells")
        if adapts:
            self._adapt_grids()

    def _adapt_grids(self) -> None:
        """Move the grids to the inputs of the next batch, the same sequences in every process."""
        batch = first_sequences(self.batches.batch(self.state.step, 0, 1), self.accelerator.device)
        share = self.config.training.grid_uniform_share
        refits: dict[str, Refit] = {}

        def adapt() -> dict[str, torch.Tensor]:
            refits.update(adapt_model(self.bare_model, batch, uniform_share=share))
            return {name: refit.matrix for name, refit in refits.items()}

        self._replace_parameters(adapt)
        errors = {name: refit.error for name, refit in refits.items()}
        values = {f"{name}/refit_error": error for name, error in errors.items()}
        # Of the next step, because a checkpoint of this one was written before.
        self._record("grid", self.state.step + 1, values)
        worst = max(errors.values())
        self.tracker.note(
            f"step {self.state.step}: grids moved, relative error at most {worst:.1e}"
        )

    def _replace_parameters(self, change: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Let `change` give the model new parameters, and carry the optimizer's state over.

        Arguments:
            change: returns name of each new parameter → the matrix that made it of the old.
        """
        window = self.meter.read()
        self.bare_model, optimizer = model, optimizer = self._whole()
        before = dict(model.named_parameters())
        matrices = change()
        point("inside-grid-change")
        carried = carry_optimizer(
            optimizer,
            before,
            model,
            self.build_optimizer,
            matrices,
            self.config.optimizer.epsilon,
        )
        self._replace(model, carried, window)

    def _replace(
        self, model: KanLMForCausalLM, optimizer: torch.optim.Optimizer, window: Window
    ) -> None:
        """Go on with this model and optimizer, whole as yet."""
        # The old wrapper has hooks on the parameters, which go with it.
        del self.model, self.optimizer
        self.accelerator.free_memory()
        self.compile_model(model)
        self._place(model, optimizer, window)

    @property
    def _sharded(self) -> bool:
        return shards(self.accelerator, self.config.training.sharding)

    def _whole(self) -> tuple[KanLMForCausalLM, torch.optim.Optimizer]:
        """Model and optimizer with whole parameters on the device; copies where these are shared.

        All processes must ask at once.
        """
        if not self._sharded:
            return self.bare_model, self._bare_optimizer
        device = self.accelerator.device
        copies = gathered_copy(
            self.bare_model, self._bare_optimizer, self.build_optimizer, device=device
        )
        assert copies is not None
        return copies

    def whole_model(self) -> KanLMForCausalLM | None:
        """The model with whole parameters, in the main process; all must ask at once."""
        main = self.accelerator.is_main_process
        if not self._sharded:
            return self.bare_model if main else None
        copies = gathered_copy(
            self.bare_model, self._bare_optimizer, self.build_optimizer, device="cpu", keep=main
        )
        return None if copies is None else copies[0]

    def _add_penalty(self) -> torch.Tensor:
        """Add the penalty's gradient to the loss's, and return the penalty.

        It depends on the weights alone, which are the same in all processes and
        micro-batches: so it comes once, after gradients have been averaged.
        """
        parameters = coefficients(self.bare_model)
        total = penalty(self.bare_model, self.penalty_weights)
        gradients = torch.autograd.grad(total, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            before = parameter.grad
            parameter.grad = gradient if before is None else before.add_(gradient)
        return total.detach()

    @property
    def learning_rate(self) -> float:
        """Rate of the next update."""
        ratio = learning_rate_ratio(
            self.config.schedule, self.state.step, self.config.training.steps
        )
        return self.config.optimizer.learning_rate * ratio

    def save(self) -> None:
        """Begin a checkpoint from which the run continues bit for bit.

        Raises:
            UserError: nothing can be written, or the text has changed meanwhile, so that the
                steps since the last checkpoint count for nothing.
        """
        with self.phases.of("checkpoint"), self.pace.of("checkpoint"):
            self._save()

    def _save(self) -> None:
        training = self.config.training
        self.state.window = self.meter.read()
        on_main(self.accelerator, self.check_data)
        reshard(self.bare_model)
        self.saving.start(
            self.state.step,
            self.bare_model,
            self._bare_optimizer,
            {**asdict(self.state), "wandb_id": self.tracker.wandb_id},
            keep=training.keep_checkpoints,
            best_step=self.state.best_step if self._keeps_best else None,
        )

    def _finish_saving(self) -> None:
        with self.phases.of("checkpoint"):
            self.saving.finish()

    def _resume(self) -> None:
        place = self.folder / "checkpoints"
        found = on_main(self.accelerator, lambda: checkpoints.checkpoint_to_resume(place, say))
        if found is None:
            return
        data_hash = self.state.data_hash
        self.state = check(Progress, checkpoints.read_state(found), str(found / "state.json"))
        if self.state.data_hash != data_hash:
            raise UserError(
                f"{found} was trained on other text than there is now in data "
                f"'{self.config.data.domain}': bring that text back, or choose another output_dir"
            )
        self._take_grids_of(self.state.step)
        in_all(
            self.accelerator,
            lambda: checkpoints.load_checkpoint(found, self.bare_model, self._bare_optimizer),
        )
        point("inside-resume")
        self.meter.start(self.state.window)
        self._resume_random_numbers(found)

    def _resume_random_numbers(self, checkpoint: Path) -> None:
        """Go on with each process's own, or with new ones where there were other processes."""
        rank, now = self.accelerator.process_index, self.accelerator.num_processes
        before = checkpoints.processes(checkpoint)
        if before == now:
            checkpoints.load_random_state(checkpoint, rank)
            return
        draw = np.random.SeedSequence([self.config.seed, self.state.step, now, rank])
        torch.manual_seed(int(draw.generate_state(1, np.uint64)[0]))
        if self.accelerator.is_main_process:
            dropout = "; dropout draws other numbers from here" if self.config.model.dropout else ""
            say(f"{checkpoint} was written by {before} processes and is read by {now}{dropout}")

    def _take_grids_of(self, step: int) -> None:
        """Give the model the shapes that it had after so many updates, for a checkpoint to fill."""
        schedule = self.config.training.grid_schedule
        if schedule is None:
            return
        size = grid_size_at(schedule, max(step - 1, 0))
        if size != schedule[0]:
            self._replace_parameters(lambda: refine_model(self.bare_model, size))

    @property
    def _bare_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @property
    def _keeps_best(self) -> bool:
        training = self.config.training
        return training.keep_best_checkpoint or training.early_stopping_patience is not None

    def _best_checkpoint(self) -> Path:
        return checkpoints.best_checkpoint(self.folder / "checkpoints", self.state.best_step)

    def _tracker(self) -> Tracker:
        return Tracker(
            self.folder,
            self.config,
            main=self.accelerator.is_main_process,
            step=self.state.step,
            pending=self.state.pending,
            wandb_id=self.state.wandb_id,
        )

    def _finished(self) -> bool:
        patience = self.config.training.early_stopping_patience
        return self.state.step >= self.config.training.steps or (
            patience is not None and self.state.stale_validations >= patience
        )

    def _after_step(self) -> None:
        """Log, validate, sample, save and stop, where one is due."""
        point("between-optimizer-and-log")
        if self._is_last or self._due(self.config.training.log_every):
            self._log()
        self.state.pending = DUTIES[0]
        self._attend()

    def _attend(self) -> None:
        """Do what is pending of the last step, then save and stop, where one is due.

        A stop does not wait for it: the resumed run does it first, to the same figures.
        """
        duties: dict[Duty, Callable[[], None]] = {
            "validation": self._validate,
            "polish": self._polish,
            "polished": self._validate_polished,
            "sample": self._sample,
        }
        with suppress(_StopError):
            while self.state.pending is not None:
                name = self.state.pending
                if self._has_duty(name):
                    self._heed_stop()
                    duties[name]()
                following = DUTIES[DUTIES.index(name) + 1 :]
                self.state.pending = following[0] if following else None
        self._save_and_stop()

    def _has_duty(self, name: Duty) -> bool:
        """Whether one of `DUTIES` is due after the last step; all before it are done."""
        training = self.config.training
        if name == "validation":
            return self._is_last or self._due(training.evaluate_every)
        if name == "sample":
            return self._finished() or self._due(training.sample_every)
        return self._is_last and training.polish_steps > 0

    @property
    def _is_last(self) -> bool:
        return self.state.step == self.config.training.steps

    def _heed_stop(self) -> None:
        """Leave what is being done to the resumed run, if a stop is wanted and can be saved for.

        All processes must ask at once.
        """
        if self.accelerator.num_processes > 1:
            flags = [self.stop.exit_code == code for code in EXIT_CODES]
            own = torch.tensor(flags, dtype=torch.float64, device=self.accelerator.device)
            self.stop_agreed = _agreed(sum_over_processes(self.accelerator, own).tolist())
        if self._stop_requested() is not None and not self.state.health.skipped_in_a_row:
            raise _StopError

    def _save_and_stop(self) -> None:
        """Save and stop, where one is due, but not while steps are being left out.

        What is saved then might be broken, and would push out what is not; but not the best.
        """
        stop = self._stop_requested()
        finished = self._finished() and self.state.pending is None
        is_best = self._keeps_best and self.state.best_step == self.state.step
        if self.all_written:
            self._finish_saving()
        if self.state.health.skipped_in_a_row and not finished and not is_best:
            return
        due = self._due(self.config.training.checkpoint_every)
        if finished or due or is_best or stop is not None:
            self.save()
        if stop is not None:
            self._finish_saving()
            interrupted = Interrupted(stop)
            interrupted.told_elsewhere = not self.accelerator.is_main_process
            raise interrupted

    def _due(self, every: int | None) -> bool:
        return every is not None and self.state.step % every == 0

    def _polish(self) -> None:
        """Polish the coefficients on the batches after the last, and say what came of it."""
        training, accelerator = self.config.training, self.accelerator
        count = (training.polish_batch_size or training.batch_size) // training.batch_size
        rank, ranks = accelerator.process_index, accelerator.num_processes
        outcome = polish(
            accelerator,
            self.bare_model,
            [self.batches.batch(training.steps + i, rank, ranks) for i in range(count)],
            micro_batch_size=training.micro_batch_size,
            steps=training.polish_steps,
            penalty_weights=self.penalty_weights,
            between=self._heed_stop,
        )
        self.state.seconds += outcome.seconds
        self.state.tokens += outcome.tokens
        self._record("polish", self.state.step, asdict(outcome))
        self.tracker.note(
            f"polished in {outcome.iterations} iterations: {outcome.loss_before:.4f} to "
            f"{outcome.loss_after:.4f} nats per token on its batch"
        )

    def _validate_polished(self) -> None:
        """Validate again, and say what the polish did to it."""
        before = self.state.last_loss
        self._validate()
        after = self.state.last_loss
        assert before is not None
        assert after is not None
        worse = "; validation got worse: leave out training.polish_steps, or raise "
        self.tracker.note(
            f"polished: {before:.4f} to {after:.4f} nats per token in validation"
            f"{worse + 'polish_batch_size' if after > before else ''}"
        )

    # Logging

    def _show(self, share: float = 0.0) -> None:
        """Show how far training is and how long it will take.

        Arguments:
            share: of the present update that is done.
        """
        if share and self.phases.on_gpu:
            # Python is ahead of the device there.
            return
        step, training = self.state.step, self.config.training

        def coming(every: int | None) -> int:
            """Of what is done every so many updates, and at the end."""
            if step == training.steps:
                return 0
            if every is None:
                return 1
            return -(-training.steps // every) - step // every

        parts = {
            "update": training.steps - step,
            "validation": coming(training.evaluate_every),
            "sample": coming(training.sample_every),
            "checkpoint": coming(training.checkpoint_every),
        }
        begun = time.perf_counter() - self.update_began
        self.tracker.show(step + share, self.pace.seconds_left(parts, begun=begun, share=share))

    def _record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write a line of metrics, all processes together: where it fails, all of them end."""
        on_main(self.accelerator, lambda: self.tracker.log(kind, step, values))

    def _log(self) -> None:
        """Write the means since the last log line, if a step was taken."""
        window = self.meter.read()
        self.meter.start(Window())
        if not window.steps:
            self.phases.read()
            return
        self.state.tokens += window.tokens
        means = window.means()
        speed, peak = means["tokens_per_second"], self.peak_tokens_per_second
        values = {
            "loss": means["loss"],
            "bits_per_byte": means["loss"] / math.log(2) * self.tokens_per_byte,
            **learning_rates(self.optimizer),
            "gradient_norm": means["gradient_norm"],
            **{name: norm.item() for name, norm in self.update_norms.items()},
            "tokens": self.state.tokens,
            "seconds": self.state.seconds,
            "compile_seconds": self.state.compile_seconds,
            "tokens_per_second": speed,
            "mfu": None if peak is None else speed / peak,
            **self.phases.read(),
            "skipped_steps": self.state.health.skipped_steps,
            "loss_spikes": self.state.health.loss_spikes,
            **self.meter.monitor.figures(window.statistics),
        }
        if self.penalty_weights:
            values["penalty"] = means["penalty"]
        if means["auxiliary_loss"]:
            values["auxiliary_loss"] = means["auxiliary_loss"]
        self._record("train", self.state.step, values)
        self.tracker.show_figures(values)

    def _validate(self) -> None:
        """Evaluate, log, and remember the best nats per token of the domain trained on."""
        with self.phases.of("validation"), self.pace.of("validation"):
            figures = self.validate(self.bare_model, self._heed_stop)
        for values in figures:
            self._record("validation", self.state.step, values)
            self.tracker.note(
                f"step {self.state.step}: {values['domain']} "
                f"{values['bits_per_byte']:.4f} bits per byte, "
                f"{values['nats_per_token']:.4f} nats per token"
            )
        self._log_occupancy()
        loss = figures[0]["nats_per_token"]
        self.state.last_loss, best = loss, self.state.best_loss
        if math.isfinite(loss) and (best is None or loss < best):
            self.state.best_loss, self.state.best_step = loss, self.state.step
            self.state.stale_validations = 0
        else:
            self.state.stale_validations += 1

    def _log_occupancy(self) -> None:
        """Log where the inputs of KAN layers fall, on some of each process's latest batch."""
        batch = first_sequences(self.latest_batch, self.accelerator.device)
        found = occupancies(self.bare_model, batch)
        values: dict[str, Any] = {}
        for name, occupancy in found.items():
            occupancy.sums = sum_over_processes(self.accelerator, occupancy.sums)
            values[f"{name}/in_range"] = occupancy.in_range.mean().item()
            values[f"{name}/use"] = occupancy.use.mean(dim=0).tolist()
        if values:
            self._record("grid", self.state.step, values)

    def _sample(self) -> None:
        text, alone = None, self.accelerator.num_processes == 1
        # A shared model needs all processes, which draw the same tokens.
        if self.accelerator.is_main_process or self._sharded:
            with self.phases.of("sample"), self.pace.of("sample"):
                text = self.sample(self.bare_model, self._heed_stop if alone else _go_on)
        prompt = self.config.generation.prompt
        self._record("sample", self.state.step, {"prompt": prompt, "text": text})

    def _stop_requested(self) -> int | None:
        """The exit code if a stop is wanted; several processes have agreed on it in the step."""
        if self.accelerator.num_processes == 1:
            return self.stop.exit_code
        return self.stop_agreed


class _StopError(Exception):
    """A stop is wanted, and what is being done is left to the resumed run."""


def _agreed(stops: list[float]) -> int | None:
    """The exit code on which processes agree, from how many of them stop with each."""
    return next((code for code, n in zip(EXIT_CODES, stops, strict=True) if n), None)


def _go_on() -> None:
    """Heed nothing: one process alone cannot stop."""
