"""What the loss adds so that edge functions become few, smooth or small."""

from torch import Tensor

from kanlm.config import PenaltySettings
from kanlm.kan.penalties import penalty
from kanlm.model import KanLMForCausalLM
from kanlm.training.callbacks import Callback


class Penalties(Callback):
    """The weighted penalties of `kanlm.kan.penalties`, a mean of `penalty` in log lines.

    Args:
        settings: their weights.
    """

    name = "penalty"

    def __init__(self, settings: PenaltySettings) -> None:
        self.weights = settings.weights

    def penalty(self, model: KanLMForCausalLM) -> Tensor | None:
        """Their sum over all layers with edge functions; None where all weights are 0."""
        return penalty(model, self.weights) if self.weights else None
