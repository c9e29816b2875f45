"""Strategies that hold back the final update of coefficients that the old text makes use of.

They act after Adam and decay, which move coefficients without a gradient, too. A coefficient is
of use by its occupancy O_ib = E_old[φ_b(x_i)²], a Fisher diagonal without the output's gradient,
which costs forward passes alone.
"""

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Gt, Lt
from torch import Tensor

from kanlm.config.schema.types import PositiveFloat, PositiveInt
from kanlm.kan.sharding import own_part, own_rows
from kanlm.training.strategies.activations import OCCUPANCY
from kanlm.training.strategies.controls import Control, control_values
from kanlm.training.strategies.function_space import FunctionSpace, Rest

if TYPE_CHECKING:
    from kanlm.training.checkpointing.callback_state import PreviousState

#: What becomes of the base function's weights and the biases of KAN layers.
BaseBranch = Literal["freeze", "train"]


class _Scaling(FunctionSpace):
    """Base class: each update of a coefficient counts by a factor of its input and function.

    Args:
        base: whether to `freeze` the base functions' weights and the biases of KAN layers, which
            are not local: they change an edge everywhere; or to `train` them.
        control, sequences, rest: as of `FunctionSpace`.
    """

    limits_updates = True

    def __init__(
        self,
        *,
        base: BaseBranch = "freeze",
        control: Control = "none",
        sequences: PositiveInt = 256,
        rest: Rest = "train",
    ) -> None:
        super().__init__(control=control, sequences=sequences, rest=rest)
        self.base: BaseBranch = base

    def start(self, previous: "PreviousState | None") -> None:
        """Make room for the factors, (in, B) of each layer."""
        super().start(previous)
        # Updates are held back from where each step finds them: θ0's checksum is enough.
        self.anchors = {}
        self.factors: dict[str, Tensor] = {
            name: torch.zeros(
                layer.coefficients.shape[:2],
                dtype=layer.coefficients.dtype,
                device=layer.coefficients.device,
            )
            for name, layer in self.layers.items()
        }

    def factors_of(self, used: dict[str, Tensor]) -> dict[str, Tensor]:
        """Factors from 0 to 1 by layer, (in, B), before any control.

        Args:
            used: occupancy by old text by layer, (in, B).
        """
        raise NotImplementedError

    def prepare(self) -> None:
        """Measure the old text, and log how much may move."""
        measured = self.measure(OCCUPANCY)
        used: dict[str, Tensor] = {}
        for (name, factors), generator in zip(self.factors.items(), self.generators(), strict=True):
            # Nothing of an expert that no token reaches is in use.
            functions = measured.get(name, torch.zeros_like(factors, dtype=torch.float64))
            used[name] = functions[:, : factors.shape[1]]
            if self.control == "permuted":
                used[name] = control_values(used[name], "permuted", generator)
        for (name, factors), generator in zip(
            self.factors_of(used).items(), self.generators(), strict=True
        ):
            control = "random" if self.control == "random" else "none"
            self.factors[name].copy_(control_values(factors, control, generator))
        self._log()

    def trains(self, name: str) -> bool:
        """Coefficients, and what the options say of the rest."""
        layer, own = self.place_of(name)
        if layer is not None and own in ("base_weight", "bias"):
            return self.base == "train"
        return super().trains(name)

    def before_update(self) -> None:
        """Keep the coefficients as they are."""
        self._before = {
            name: own_part(layer.coefficients.detach()).clone()
            for name, layer in self.layers.items()
        }

    @torch.no_grad()
    def after_update(self) -> None:
        """Let through as much of the update as the factors say, all or nothing at 1 and 0."""
        for name, layer in self.layers.items():
            start, stop = own_rows(layer.coefficients)
            factors = self.factors[name][start:stop].unsqueeze(-1)
            moved = own_part(layer.coefficients)
            moved.copy_(torch.lerp(self._before[name], moved, factors))
        del self._before

    def state_dict(self) -> dict[str, Any]:
        """The factors, by layer."""
        return {**super().state_dict(), **self.factors}

    def _log(self) -> None:
        """Say how much of the updates comes through, by layer."""
        shares = {f"{name}/may_move": f.mean().item() for name, f in self.factors.items()}
        trainer = self.trainer
        trainer.record("strategy", shares, step=1)
        low, high = min(shares.values()), max(shares.values())
        warning = "; no coefficient may move" if high == 0 else ""
        trainer.tracker.print_line(
            f"{self.name}: {low:.1%} to {high:.1%} of the coefficients' updates come "
            f"through, by layer{warning}"
        )


class OccupancyMask(_Scaling):
    """Lets a KAN layer's coefficients move only where the old text has made little use of them.

    Coefficient c_ibo is free where O_ib < threshold.

    Args:
        threshold: τ, a mean square of a basis function.
        base: as of `_Scaling`.
        control, sequences, rest: as of `FunctionSpace`.
    """

    name = "occupancy-mask"

    def __init__(
        self,
        *,
        threshold: PositiveFloat = 1e-3,
        base: BaseBranch = "freeze",
        control: Control = "none",
        sequences: PositiveInt = 256,
        rest: Rest = "train",
    ) -> None:
        super().__init__(base=base, control=control, sequences=sequences, rest=rest)
        self.threshold = threshold

    def factors_of(self, used: dict[str, Tensor]) -> dict[str, Tensor]:
        """1 where O < τ, else 0."""
        return {name: (o < self.threshold).double() for name, o in used.items()}


class OccupancyScaling(_Scaling):
    """Scales updates of a KAN layer's coefficients by 1 / (1 + O_ib / threshold).

    Args:
        threshold: τ, the occupancy at which half of an update comes through.
        base: as of `_Scaling`.
        control, sequences, rest: as of `FunctionSpace`.
    """

    name = "occupancy-scaling"

    def __init__(
        self,
        *,
        threshold: PositiveFloat = 1e-2,
        base: BaseBranch = "freeze",
        control: Control = "none",
        sequences: PositiveInt = 256,
        rest: Rest = "train",
    ) -> None:
        super().__init__(base=base, control=control, sequences=sequences, rest=rest)
        self.threshold = threshold

    def factors_of(self, used: dict[str, Tensor]) -> dict[str, Tensor]:
        """1 / (1 + O / τ)."""
        return {name: 1 / (1 + o / self.threshold) for name, o in used.items()}


class TfIdf(_Scaling):
    """Lets only those coefficients move whose functions are of use to the new text, not the old.

    Those are the share of each KAN layer with the largest O_new / (O_old + ε), after the slots of
    sparse memory fine-tuning (arXiv 2510.15103).

    Args:
        share: of a layer's functions, inputs times B, that may move.
        epsilon: ε, an occupancy that counts as none.
        base: as of `_Scaling`.
        control, sequences, rest: as of `FunctionSpace`.
    """

    name = "tf-idf"

    def __init__(
        self,
        *,
        share: Annotated[float, Gt(0), Lt(1)] = 0.1,
        epsilon: PositiveFloat = 1e-6,
        base: BaseBranch = "freeze",
        control: Control = "none",
        sequences: PositiveInt = 256,
        rest: Rest = "train",
    ) -> None:
        super().__init__(base=base, control=control, sequences=sequences, rest=rest)
        self.share, self.epsilon = share, epsilon

    def factors_of(self, used: dict[str, Tensor]) -> dict[str, Tensor]:
        """1 for the share with the largest score, else 0."""
        measured = self.measure(OCCUPANCY, new=True)
        found = {}
        for name, old in used.items():
            new = measured.get(name, torch.zeros_like(old))[:, : old.shape[1]]
            score = (new / (old + self.epsilon)).flatten()
            best = score.argsort(descending=True, stable=True)
            mask = torch.zeros_like(score)
            mask[best[: math.ceil(self.share * len(best))]] = 1
            found[name] = mask.view_as(old)
        return found
