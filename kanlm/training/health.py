"""Steps that are not to be taken: a loss or gradient that is no number, or a loss that leaps.

A step that is left out changes neither weights nor moments; the next one has the next batch
and the next learning rate. All processes see the same sums, and so decide alike.
"""

import math
import statistics
from dataclasses import dataclass, field
from typing import ClassVar

from kanlm.config import TrainingSettings

#: Losses with which a new one is compared, and how many there must be.
WINDOW, ENOUGH = 128, 32


@dataclass
class Health:
    """What is remembered of steps so far; a part of checkpoints."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    #: Steps left out, all told and since the last that was taken.
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    loss_spikes: int = 0
    #: Of the newest steps, where finite.
    losses: list[float] = field(default_factory=list)

    def judge(
        self, loss: float, gradient_norm: float, training: TrainingSettings
    ) -> tuple[bool, str | None]:
        """Whether to take the step, and what is unusual about it, in words.

        Arguments:
            loss: of the global batch.
            gradient_norm: before clipping; any number that is finite where it is.
        """
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            return self._left_out(f"the loss is {loss}, the gradient's norm {gradient_norm}")
        above = self._deviations_above(loss)
        self.losses = [*self.losses, loss][-WINDOW:]
        threshold = training.loss_spike_deviations
        if threshold is None or above <= threshold:
            self.skipped_in_a_row = 0
            return True, None
        self.loss_spikes += 1
        unusual = f"the loss is {loss:.4f}, {above:.1f} standard deviations above those before"
        if training.skip_loss_spikes:
            return self._left_out(unusual)
        self.skipped_in_a_row = 0
        return True, unusual

    def _left_out(self, unusual: str) -> tuple[bool, str]:
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        return False, unusual

    def _deviations_above(self, loss: float) -> float:
        if len(self.losses) < ENOUGH:
            return 0.0
        deviation = statistics.stdev(self.losses)
        return (loss - statistics.fmean(self.losses)) / deviation if deviation else 0.0
