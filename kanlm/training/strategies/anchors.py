"""Strategies that pull parameters to where the base run left them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kanlm.config.schema.types import NonNegativeFloat, PositiveInt
from kanlm.errors import UserError
from kanlm.training.strategies.base import Anchored, Prepared, checksum
from kanlm.training.strategies.fisher import fisher_diagonal
from kanlm.training.strategies.old_text import row

if TYPE_CHECKING:
    from kanlm.model import KanLMForCausalLM
    from kanlm.training.checkpointing.callback_state import PreviousState


class L2SP(Anchored):
    """Adds weight/2 ‖θ − θ0‖² to the loss, θ0 being the base run's parameters.

    (Li et al., arXiv 1802.01483.)

    Args:
        weight: α of the penalty.
    """

    name = "l2sp"

    def __init__(self, *, weight: NonNegativeFloat = 1e-3) -> None:
        self.weight = weight

    def penalty(self, model: "KanLMForCausalLM") -> Tensor:
        """The penalty, ()."""
        terms = [(p - self.anchors[name]).square().sum() for name, p in model.named_parameters()]
        return 0.5 * self.weight * sum(terms[1:], start=terms[0])


class EWC(Prepared):
    """Adds weight/2 Σ F (θ − θ0)² to the loss, F being the diagonal Fisher information.

    (Kirkpatrick et al., arXiv 1612.00796; one penalty for all earlier texts as in online EWC,
    Schwarz et al., arXiv 1805.06370, with γ = 1.) F is the mean squared gradient of a sequence's
    loss in nats per token. At its end the run leaves F of its own text, added to the earlier
    texts', to a run that starts from it. If the base run has left none, F is measured before the
    first update, on the text of the runs that this one starts from.

    Args:
        weight: λ of the penalty; models differ in what suits them by powers of ten.
        sequences: of each measurement of F.
    """

    name = "ewc"
    reads_old_text = True

    def __init__(self, *, weight: NonNegativeFloat = 1e3, sequences: PositiveInt = 128) -> None:
        self.weight, self.sequences = weight, sequences

    def start(self, previous: "PreviousState | None") -> None:
        """Copy θ0, and read F if the base run has left it."""
        super().start(previous)
        self.fisher = {name: torch.zeros_like(anchor) for name, anchor in self.anchors.items()}
        if previous is None:
            return
        base = self.trainer.config.initialize_from
        if previous.values["model"] != self.base_sum:
            raise UserError(f"{base}/callbacks holds a Fisher information of another model")
        self.fisher = {
            name: previous.tensor(name, like=anchor) for name, anchor in self.anchors.items()
        }
        self.prepared = True

    def prepare(self) -> None:
        """Measure F on old text."""
        rows = (self.old_text.row(number) for number in range(self.sequences))
        for name, found in fisher_diagonal(self.trainer, rows).items():
            self.fisher[name].copy_(found)

    def penalty(self, model: "KanLMForCausalLM") -> Tensor:
        """The penalty, ()."""
        terms = [
            (self.fisher[name] * (p - self.anchors[name]).square()).sum()
            for name, p in model.named_parameters()
        ]
        return 0.5 * self.weight * sum(terms[1:], start=terms[0])

    def finish(self, model: "KanLMForCausalLM") -> Mapping[str, Any]:
        """Leave F of all texts so far, this run's at its last parameters."""
        rows = (row(self.trainer.batches, number) for number in range(self.sequences))
        found = fisher_diagonal(self.trainer, rows)
        total = {name: self.fisher[name] + found[name] for name in found}
        return {**total, "model": checksum(model)}

    def state_dict(self) -> dict[str, Any]:
        """F, by parameter."""
        return {**super().state_dict(), **self.fisher}
