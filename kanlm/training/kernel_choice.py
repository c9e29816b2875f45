"""Which backend adds up KAN layers in a run: measured before its first step, and kept."""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import nn

from kanlm.kan.kernels import TrainingBackend, prefer_backend
from kanlm.kan.kernels.dispatch import chosen_backend
from kanlm.kan.kernels.measured import NAMES, Measured, fastest_backend, remembered_backend
from kanlm.training.callbacks import Callback


class KernelChoice(Callback):
    """Has layers take the backend of `training.kan_backend`, or for `auto` the fastest one.

    The main rank times the backends that could serve, and all ranks take the same. The choice is
    kept in `TrainingState.kan_backend`, so that a resumed run computes the same, also on another
    machine, and remembered on this one, so that a run that starts anew does. Kernels that fail
    leave layers to torch's, with a warning.

    Args:
        compiled: time compiled code, as the run's is.
        on_main: calls a function on the main rank alone, and returns its result on all.
        report: prints a line.
    """

    def __init__(
        self,
        *,
        compiled: bool,
        on_main: Callable[[Callable[[], Measured]], Measured],
        report: Callable[[str], None],
    ) -> None:
        self.compiled = compiled
        self.on_main = on_main
        self.report = report
        self._tried = False
        self._preferred = ExitStack()

    def before_resume(self, step: int) -> None:
        """Take the run's backend before what its last step has left to do, such as validation."""
        if self.trainer.state.kan_backend:
            self._choose()

    def before_step(self) -> None:
        self._choose()

    def _choose(self) -> None:
        """Take what the run has taken, what the setting says, or what is fastest; once a start."""
        # What `use_backend` asks for around the run holds.
        if self._tried or chosen_backend() != "auto":
            return
        self._tried = True
        state, setting = self.trainer.state, self.trainer.config.training.kan_backend
        wanted = state.kan_backend or setting
        if wanted in ("auto", "triton"):
            # A single one is tried, because its kernels may fail on this machine.
            single: TrainingBackend | None = None if wanted == "auto" else wanted
            found = self.on_main(lambda: self._measure(single))
            if wanted == "auto" and found.seconds:
                self.report(self._in_words(found))
            wanted = found.backend
        state.kan_backend = wanted
        self._prefer(wanted)

    def finish(self, model: nn.Module) -> None:
        """Evaluate with the same backend, also where no step was left to take."""
        if self.trainer.state.kan_backend:
            self._prefer(self.trainer.state.kan_backend)

    def close(self) -> None:
        """Let layers take what they took before the run."""
        self._preferred.close()

    def _prefer(self, backend: TrainingBackend) -> None:
        self._preferred.close()
        self._preferred.enter_context(prefer_backend(backend))

    def _measure(self, single: TrainingBackend | None) -> Measured:
        training, model = self.trainer.config.training, self.trainer.model
        rows = training.batch_size // self.trainer.accelerator.num_processes
        tokens = (training.micro_batch_size or rows) * self.trainer.config.model.context_length
        autocast = torch.bfloat16 if training.precision == "bf16" else None
        if single is None:
            return remembered_backend(
                model, tokens=tokens, autocast=autocast, compiled=self.compiled
            )
        return fastest_backend(
            model, tokens=tokens, autocast=autocast, compiled=self.compiled, candidates=[single]
        )

    def _in_words(self, found: Measured) -> str:
        device = self.trainer.accelerator.device.type
        times = ", ".join(
            f"{NAMES.get((device, each), each)} {1e3 * seconds:.1f} ms"
            for each, seconds in found.seconds.items()
        )
        return (
            f"KAN layers: training.kan_backend = {found.backend}, the fastest here "
            f"({times} for all layers on {found.tokens:,} tokens)"
        )
