"""What the function-space strategies have in common: they measure what layers use of old text."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from kanlm.config import Config
from kanlm.training.callbacks import Batch
from kanlm.training.strategies.activations import (
    Measure,
    kan_layers,
    mean_over_tokens,
)
from kanlm.training.strategies.base import Prepared
from kanlm.training.strategies.controls import Control, generator_for
from kanlm.training.strategies.old_text import row, stack

if TYPE_CHECKING:
    from kanlm.training.checkpointing.callback_state import PreviousState

#: Whether what no strategy of this family can hold back is trained.
Rest = Literal["train", "freeze"]


class FunctionSpace(Prepared):
    """Base class of strategies that measure what the model's layers are given on old text.

    What a layer's basis owns itself, such as the scale of a wavelet, is not trained: it would
    change the functions that have been measured.

    Args:
        control: `none`; or `random` or `permuted`, which hold back as much in other places.
        sequences: of old text that are measured, rounded up to whole batches.
        rest: whether to train what is not in the layers, or to `freeze` it.
    """

    reads_old_text = True
    #: What a model must have for it.
    needs: ClassVar[str] = "a KAN layer, whose coefficients it could hold back"

    def __init__(
        self, *, control: Control = "none", sequences: int = 256, rest: Rest = "train"
    ) -> None:
        self.control: Control = control
        self.sequences = sequences
        self.rest: Rest = rest
        self.layers: dict[str, Any] = {}

    def find_layers(self, model: nn.Module) -> dict[str, Any]:
        """The layers that the strategy holds back, by name."""
        return kan_layers(model)

    def check(self, config: Config, model: nn.Module) -> None:
        """Check that the model has such layers, too."""
        super().check(config, model)
        if not self.find_layers(model):
            raise ValueError(f"the model has not what it needs, {self.needs}")

    def start(self, previous: "PreviousState | None") -> None:
        """Find the layers."""
        super().start(previous)
        self.layers = self.find_layers(self.trainer.model)

    def trains(self, name: str) -> bool:
        """All but bases, or what is in the layers."""
        layer, own = self.place_of(name)
        return own != "basis" if layer is not None else self.rest == "train"

    def place_of(self, name: str) -> tuple[str | None, str]:
        """The layer that a parameter is in, None if in none, and what it is there."""
        outer, basis, _ = name.partition(".basis.")
        layer, own = (outer, "basis") if basis else (name.rpartition(".")[::2])
        return (layer if layer in self.layers else None), own

    def measure(self, measure: Measure, *, new: bool = False) -> dict[str, Tensor]:
        """Means over the tokens of old text, or of new, by layer, as of `mean_over_tokens`."""
        return mean_over_tokens(self.trainer, self.layers, self._batches(new=new), measure)

    def generators(self) -> Iterator[torch.Generator]:
        """Random numbers of each layer, for the control."""
        return (generator_for(self.trainer.config.seed, n) for n in range(len(self.layers)))

    def _batches(self, *, new: bool) -> Iterator[Batch]:
        """This rank's rows, as many at a time as in training."""
        accelerator, training = self.trainer.accelerator, self.trainer.config.training
        share = training.batch_size // accelerator.num_processes
        size = training.micro_batch_size or share
        rank = accelerator.process_index
        for step in range(math.ceil(self.sequences / training.batch_size)):
            first = step * training.batch_size + rank * share
            for start in range(first, first + share, size):
                numbers = range(start, min(start + size, first + share))
                if new:
                    yield stack([row(self.trainer.batches, number) for number in numbers])
                else:
                    yield stack([self.old_text.row(number) for number in numbers])
