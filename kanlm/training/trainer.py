"""The training loop, for pretraining and fine-tuning alike.

`train()` reads as the life of a run; `train_step()` is one update. The loop owns what
Accelerate does not keep exactly: the data cursor (an integer, because the batch is a
function of seed and step), the learning rate (a function of the step), checkpoints and
random states.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from kanlm.config import Config
from kanlm.data.loader import Batches
from kanlm.errors import Interrupted, UserError
from kanlm.training import checkpoint as checkpoints
from kanlm.training.optimizer import set_learning_rate
from kanlm.training.schedule import learning_rate_ratio
from kanlm.training.tracking import Tracker, training_status


@dataclass
class Progress:
    """What the loop must remember between steps, and a checkpoint between processes."""

    step: int = 0
    tokens: int = 0
    #: Seconds in training steps: no evaluation, sampling, checkpoints or start.
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int = 0
    stale_validations: int = 0
    wandb_id: str | None = None
    #: Sums since the last log line, over all processes.
    window: "Window" = field(default_factory=lambda: Window())


@dataclass
class Window:
    """Sums over the steps since the last log line."""

    loss: float = 0.0
    gradient_norm: float = 0.0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0


class Trainer:
    """One run's model, optimizer and data, and the loop over them.

    Arguments:
        config: the resolved configuration.
        accelerator: places the model and talks to other processes.
        model: a causal language model whose forward takes `shift_labels` and
            `num_items_in_batch` and returns a loss.
        optimizer: over the model's parameters.
        batches: `batch(step, rank, world_size)`.
        validate: evaluates the unwrapped model, returning one dictionary of figures a
            domain; the first is the domain trained on.
        sample: continues the prompt with the unwrapped model.
        tokens_per_byte: of the training text, to show the loss in bits per byte.
        folder: the run's folder.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Batches,
        *,
        validate: Callable[[nn.Module], list[dict[str, Any]]],
        sample: Callable[[nn.Module], str],
        tokens_per_byte: float,
        folder: Path,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.batches = batches
        self.validate = validate
        self.sample = sample
        self.tokens_per_byte = tokens_per_byte
        self.folder = folder
        self.state = Progress()
        if config.training.batch_size % accelerator.num_processes:
            raise UserError(
                f"training.batch_size = {config.training.batch_size} does not divide among "
                f"{accelerator.num_processes} processes"
            )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.bare_model = accelerator.unwrap_model(self.model)
        self.stop_signal: int | None = None
        self._start_window(Window())
        self._resume()

    def train(self) -> None:
        """Run the remaining steps. Raises Interrupted after saving, on SIGINT or SIGTERM."""
        with self._tracker() as self.tracker, self._signals_noted():
            while not self._finished():
                self.train_step()
                self._after_step()
        if self.config.training.early_stopping_patience is not None:
            checkpoints.load_weights(self.bare_model, self._best_path)

    def train_step(self) -> None:
        """One update on the global batch of this step.

        The loss is the sum over this process's tokens divided by the tokens of the global
        batch, so that neither the number of micro-batches nor of processes changes the
        gradient.
        """
        started = time.perf_counter()
        accelerator, training = self.accelerator, self.config.training
        batch = self.batches.batch(
            self.state.step, accelerator.process_index, accelerator.num_processes
        )
        batch = {key: value.to(accelerator.device) for key, value in batch.items()}
        tokens = sum_over_processes(accelerator, (batch["shift_labels"] != -100).sum())

        rows = batch["input_ids"].shape[0]
        size = training.micro_batch_size or rows
        for start in range(0, rows, size):
            micro = {key: value[start : start + size] for key, value in batch.items()}
            last = start + size >= rows
            with nullcontext() if last else accelerator.no_sync(self.model):
                loss = self.model(**micro, num_items_in_batch=tokens).loss
                # Gradients are averaged over processes; the loss is already a share of a sum.
                accelerator.backward(loss * accelerator.num_processes)
            self._sums[0] += loss.detach()

        clip = training.gradient_clip if training.gradient_clip is not None else math.inf
        norm = accelerator.clip_grad_norm_(self.model.parameters(), clip)
        assert norm is not None
        self._sums[1] += norm
        set_learning_rate(self.optimizer, self.learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._sums[2] += tokens
        self.state.window.steps += 1
        self.state.step += 1
        seconds = time.perf_counter() - started
        self.state.window.seconds += seconds
        self.state.seconds += seconds

    @property
    def learning_rate(self) -> float:
        """Rate of the next update."""
        ratio = learning_rate_ratio(
            self.config.schedule, self.state.step, self.config.training.steps
        )
        return self.config.optimizer.learning_rate * ratio

    def save(self) -> None:
        """Write a checkpoint from which the run continues bit for bit."""
        self._read_window()
        random_states = gather_object([_random_state()])
        if self.accelerator.is_main_process:
            checkpoints.save_checkpoint(
                self.folder / "checkpoints",
                self.state.step,
                self.bare_model,
                self._bare_optimizer,
                random_states,
                {**asdict(self.state), "wandb_id": self.tracker.wandb_id},
                self.config.training.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        found = checkpoints.latest_checkpoint(self.folder / "checkpoints")
        if found is None:
            return
        state = checkpoints.load_checkpoint(found, self.bare_model, self._bare_optimizer)
        window = Window(**state.pop("window"))
        self.state = Progress(**state)
        self._start_window(window)
        _set_random_state(checkpoints.load_random_state(found, self.accelerator.process_index))

    @property
    def _bare_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @property
    def _best_path(self) -> Path:
        return self.folder / "checkpoints" / "best" / "model.safetensors"

    def _tracker(self) -> Tracker:
        return Tracker(
            self.folder,
            self.config,
            main=self.accelerator.is_main_process,
            step=self.state.step,
            wandb_id=self.state.wandb_id,
        )

    def _finished(self) -> bool:
        patience = self.config.training.early_stopping_patience
        return self.state.step >= self.config.training.steps or (
            patience is not None and self.state.stale_validations >= patience
        )

    def _after_step(self) -> None:
        """Log, validate, sample, save and stop, where one is due."""
        training = self.config.training
        last = self.state.step == training.steps
        if last or self._due(training.log_every):
            self._log()
        if last or self._due(training.evaluate_every):
            self._validate()
        if self._finished() or self._due(training.sample_every):
            self._sample()
        if self._finished() or self._due(training.checkpoint_every):
            self.save()
        if not self._finished() and self._stop_requested():
            self.save()
            raise Interrupted(self.stop_signal or signal.SIGTERM)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.state.step % every == 0

    # Logging

    def _start_window(self, window: Window) -> None:
        """Go on from `window`, whose loss is a sum over processes and so goes to one."""
        self.state.window = window
        main = self.accelerator.is_main_process
        values = [window.loss if main else 0.0, window.gradient_norm, window.tokens]
        self._sums = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)

    def _read_window(self) -> Window:
        """Bring the sums kept on the device into `state.window`: the only wait for it."""
        window = self.state.window
        window.loss = sum_over_processes(self.accelerator, self._sums[0]).item()
        window.gradient_norm, window.tokens = self._sums[1].item(), int(self._sums[2].item())
        return window

    def _log(self) -> None:
        """Write the means since the last log line."""
        window = self._read_window()
        self.state.tokens += window.tokens
        self._start_window(Window())
        loss, speed = window.loss / window.steps, window.tokens / window.seconds
        bits = loss / math.log(2) * self.tokens_per_byte
        values = {
            "loss": loss,
            "bits_per_byte": bits,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": window.gradient_norm / window.steps,
            "tokens": self.state.tokens,
            "seconds": self.state.seconds,
            "tokens_per_second": speed,
        }
        self.tracker.log("train", self.state.step, values)
        self.tracker.show(self.state.step, training_status(values))

    def _validate(self) -> None:
        figures = self.validate(self.bare_model)
        for values in figures:
            self.tracker.log("validation", self.state.step, values)
            self.tracker.note(
                f"step {self.state.step}: {values['domain']} "
                f"{values['bits_per_byte']:.4f} bits per byte, "
                f"{values['nats_per_token']:.4f} nats per token"
            )
        loss = figures[0]["nats_per_token"]
        if self.state.best_loss is None or loss < self.state.best_loss:
            self.state.best_loss, self.state.best_step = loss, self.state.step
            self.state.stale_validations = 0
            if self.config.training.early_stopping_patience is not None:
                self._save_best()
        else:
            self.state.stale_validations += 1

    def _save_best(self) -> None:
        if self.accelerator.is_main_process:
            checkpoints.save_weights(self.bare_model, self._best_path.parent)
        self.accelerator.wait_for_everyone()

    def _sample(self) -> None:
        if self.accelerator.is_main_process:
            text = self.sample(self.bare_model)
            prompt = self.config.generation.prompt
            self.tracker.log("sample", self.state.step, {"prompt": prompt, "text": text})

    # Signals

    @contextmanager
    def _signals_noted(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM for the end of the step; a second SIGINT stops at once."""

        def note(number: int, frame: FrameType | None) -> None:
            self.stop_signal = number
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.tracker.note("stopping after this step; Ctrl-C again stops without saving")

        before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop_requested(self) -> bool:
        """Whether any process was signalled; several processes agree at log lines only."""
        if self.accelerator.num_processes == 1:
            return self.stop_signal is not None
        if not self._due(self.config.training.log_every):
            return False
        flag = torch.tensor(float(self.stop_signal or 0), device=self.accelerator.device)
        return sum_over_processes(self.accelerator, flag).item() > 0


def sum_over_processes(accelerator: Accelerator, tensor: torch.Tensor) -> torch.Tensor:
    """All-reduce; the tensor itself where there is one process."""
    total = accelerator.reduce(tensor, "sum")
    assert isinstance(total, torch.Tensor)
    return total


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
