"""What is counted in training, on the device until a log line is due, and the log lines.

`Accumulator` sums a step's figures, `ModuleCounters` what the model's own modules count,
`PhaseTimer` where the time goes; `TrainLog` writes them as `train` lines of metrics.jsonl.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kanlm.kan.monitoring import Monitored
from kanlm.kan.sharding import gathered
from kanlm.training.callbacks import Callback
from kanlm.training.distributed import sum_over_ranks
from kanlm.training.optimizer import learning_rates

#: Module's name → its sums over the steps since the last log line, and over ranks.
ModuleSums = dict[str, list[float]]


@dataclass
class Window:
    """Sums over the steps since the last log line, over all ranks."""

    #: Nats a token of the language model alone.
    loss: float = 0.0
    gradient_norm: float = 0.0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    #: What is minimised in addition to the loss, by its name in log lines.
    terms: dict[str, float] = field(default_factory=dict)
    #: Of the model's monitored modules.
    statistics: ModuleSums = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """Figures a step or a second."""
        return {
            "loss": self.loss / self.steps,
            "gradient_norm": self.gradient_norm / self.steps,
            "tokens_per_second": self.tokens / self.seconds,
            **{name: total / self.steps for name, total in self.terms.items()},
        }


class Accumulator:
    """The window that is open, its sums still on the device.

    Args:
        model: without wrappers; its monitored modules count along.
        accelerator: says on which device, and sums over ranks.
        window: to continue from, summed over all ranks.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator, window: Window) -> None:
        self.accelerator = accelerator
        self.modules = ModuleCounters(
            model, accelerator.device, partial(sum_over_ranks, accelerator)
        )
        self.start(window)

    def start(self, window: Window) -> None:
        """Continue from `window`; what is a sum over ranks goes to one of them."""
        main = self.accelerator.is_main_process
        self._steps, self._seconds = window.steps, window.seconds
        known = {
            "loss": window.loss,
            "gradient_norm": window.gradient_norm,
            "tokens": window.tokens,
            **window.terms,
        }
        self._sums = {
            name: self._scalar(value if main or _is_same_on_all_ranks(name) else 0.0)
            for name, value in known.items()
        }
        self._step = {name: torch.zeros_like(total) for name, total in self._sums.items()}
        self.modules.start(window.statistics if main else {})

    def add(self, name: str, value: Tensor) -> None:
        """Add to one of the sums of the step in progress, without waiting for the device.

        For parts of the loss and what the loop counts: `step_loss`, by which a step is judged, is
        the sum of all but `gradient_norm`, `tokens` and penalties. What is only logged goes to
        `trainer.record`.

        Args:
            name: `loss`, `gradient_norm`, `tokens`, or of another term; of what depends
                on the weights alone `penalty`, or `penalty/…`.
        """
        if name not in self._step:
            self._step[name], self._sums[name] = self._scalar(0.0), self._scalar(0.0)
        self._step[name] += value

    @property
    def step_loss(self) -> Tensor:
        """Of the step in progress: this rank's part of all that is minimised over tokens."""
        parts = [value for name, value in self._step.items() if not _is_same_on_all_ranks(name)]
        return torch.stack(parts).sum()

    def end_step(self, seconds: float, *, taken: bool) -> None:
        """Take the step in progress into the window, with the time it took, or leave it out."""
        if taken:
            self._steps += 1
            self._seconds += seconds
            for name, value in self._step.items():
                self._sums[name] += value
        for value in self._step.values():
            value.zero_()

    def read(self) -> Window:
        """The sums over all ranks, which must all ask at once: this waits for the device."""
        names = [name for name in self._sums if not _is_same_on_all_ranks(name)]
        own = torch.stack([self._sums[name] for name in names])
        summed = dict(zip(names, sum_over_ranks(self.accelerator, own), strict=True))
        sums = {name: value.item() for name, value in {**self._sums, **summed}.items()}
        return Window(
            loss=sums.pop("loss"),
            gradient_norm=sums.pop("gradient_norm"),
            tokens=int(sums.pop("tokens")),
            steps=self._steps,
            seconds=self._seconds,
            terms=sums,
            statistics=self.modules.read(),
        )

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)


def _is_same_on_all_ranks(name: str) -> bool:
    """Whether a figure of a step is the same on all ranks, rather than of each one's tokens."""
    return name in ("gradient_norm", "tokens") or name.partition("/")[0] == "penalty"


class ModuleCounters:
    """What the monitored modules of a model count (`kanlm.kan.monitoring`).

    Their sums stay on the device until a line is due; then those of all ranks are added up in
    one all-reduce.

    Args:
        model: without wrappers; wrapping and compiling it changes nothing here.
        device: where its modules count.
        reduce: sums a tensor over ranks.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, reduce: Callable[[Tensor], Tensor]
    ) -> None:
        self.modules = {
            name: module for name, module in model.named_modules() if isinstance(module, Monitored)
        }
        self.device = device
        self.reduce = reduce

    def start(self, sums: Mapping[str, list[float]]) -> None:
        """Count on from `sums`, from 0 where a module has none.

        Sums over ranks must be given to one of them only.
        """
        for name, module in self.modules.items():
            module.start_counting(self.device)
            if name in sums:
                module.count(torch.tensor(sums[name], dtype=torch.float64, device=self.device))

    def read(self) -> ModuleSums:
        """Sums over all ranks, which must all ask at once: this waits for the device."""
        if not self.modules:
            return {}
        parts = [module.sums for module in self.modules.values() if module.sums is not None]
        values = iter(self.reduce(torch.cat(parts)).tolist())
        return {
            name: [next(values) for _ in range(module.num_sums)]
            for name, module in self.modules.items()
        }

    def figures(self, sums: ModuleSums) -> dict[str, float]:
        """What `sums` mean, as `module/figure`."""
        return {
            f"{name}/{figure}": value
            for name, module in self.modules.items()
            for figure, value in module.figures(sums[name]).items()
        }


class PhaseTimer:
    """A stopwatch for the parts of training, which does not wait for the device.

    A GPU is still at work when Python has gone on: there, events in its own queue tell when
    a phase began and ended, and are read when a log line waits for the device anyway.

    Args:
        device: where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count the block as this phase's."""
        if self.on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - started

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last reading, as `phase_seconds/PHASE`.

        On a GPU this waits for the last phase to end.
        """
        for name, start, end in self._events:
            end.synchronize()
            self._seconds[name] += start.elapsed_time(end) / 1000
        found = {f"phase_seconds/{name}": seconds for name, seconds in self._seconds.items()}
        self._events.clear()
        self._seconds.clear()
        return found


class TrainLog(Callback):
    """Writes a `train` line every `training.log_every` steps and after the last.

    Args:
        tokens_per_byte: of the training text, to show the loss in bits per byte.
        peak_tokens_per_second: what all devices would train on if they did nothing else but
            multiply at their peak; None where that is not known, as on CPUs.
    """

    def __init__(self, tokens_per_byte: float, peak_tokens_per_second: float | None) -> None:
        self.tokens_per_byte = tokens_per_byte
        self.peak_tokens_per_second = peak_tokens_per_second
        self._before: list[list[Tensor]] | None = None
        self._norms: dict[str, Tensor] = {}

    def before_update(self) -> None:
        """Before a log line, hold a copy of all parameters: activations are gone."""
        step, training = self.trainer.state.step + 1, self.trainer.config.training
        if step == training.steps or step % training.log_every == 0:
            self._before = copied_parameters(self.trainer.optimizer)

    def after_update(self) -> None:
        """Measure how far the update went, masks of other callbacks included."""
        if self._before is not None:
            self._norms = update_norms(self.trainer.optimizer, self._before)
            self._before = None

    def after_step(self) -> None:
        """Write the means since the last log line, if a step was taken."""
        trainer = self.trainer
        if not (trainer.is_last or trainer.due(trainer.config.training.log_every)):
            return
        state, phases = trainer.state, trainer.phases
        window = trainer.accumulator.read()
        trainer.accumulator.start(Window())
        if not window.steps:
            phases.read()
            return
        state.tokens += window.tokens
        means = window.means()
        loss, speed = means.pop("loss"), means.pop("tokens_per_second")
        peak = self.peak_tokens_per_second
        values = {
            "loss": loss,
            "bits_per_byte": loss / math.log(2) * self.tokens_per_byte,
            **learning_rates(trainer.optimizer),
            "gradient_norm": means.pop("gradient_norm"),
            **{name: norm.item() for name, norm in self._norms.items()},
            "tokens": state.tokens,
            "seconds": state.seconds,
            "compile_seconds": state.compile_seconds,
            "tokens_per_second": speed,
            "mfu": None if peak is None else speed / peak,
            **phases.read(),
            "skipped_steps": state.guard.skipped_steps,
            "loss_spikes": state.guard.loss_spikes,
            **trainer.accumulator.modules.figures(window.statistics),
            **means,
        }
        trainer.record("train", values)
        trainer.tracker.show_figures(values)


def copied_parameters(optimizer: torch.optim.Optimizer) -> list[list[Tensor]]:
    """Copies of an optimizer's parameters, by group."""
    return [[p.detach().clone() for p in group["params"]] for group in optimizer.param_groups]


def update_norms(optimizer: torch.optim.Optimizer, before: list[list[Tensor]]) -> dict[str, Tensor]:
    """How far parameters have moved; nothing waits for the device.

    Args:
        before: as of `copied_parameters`; overwritten. Of sharded parameters all ranks must
            ask at once.

    Returns:
        `update_norm`, the Euclidean length of the change of all parameters, and
        `update_norm/GROUP` of each group, where there are several.
    """
    norms: dict[str, Tensor] = {}
    parts = []
    for group, changes in zip(optimizer.param_groups, before, strict=True):
        for change, parameter in zip(changes, group["params"], strict=True):
            change.sub_(parameter.detach())
        parts.append(gathered(torch.nn.utils.get_total_norm(changes)))
        if len(optimizer.param_groups) > 1:
            norms[f"update_norm/{group['name']}"] = parts[-1]
    norms["update_norm"] = torch.stack(parts).norm()
    return norms
