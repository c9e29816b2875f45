"""Strategies that add to the loss how far edge functions or linear maps move on old text."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from kanlm.config.schema.types import NonNegativeFloat, PositiveInt
from kanlm.kan import KANLinear
from kanlm.kan.sharding import gathered
from kanlm.training.strategies.activations import (
    COVARIANCE,
    OCCUPANCY,
    PRODUCTS,
    Measure,
    linear_layers,
)
from kanlm.training.strategies.controls import (
    Control,
    control_covariance,
    control_products,
    control_values,
)
from kanlm.training.strategies.function_space import FunctionSpace, Rest

if TYPE_CHECKING:
    from kanlm.model import KanLMForCausalLM
    from kanlm.training.checkpointing.callback_state import PreviousState

#: What becomes of the base function's weights: they count as one more function of an edge, stay
#: as they are, or are trained freely.
BaseWeights = Literal["penalise", "freeze", "train"]


class _Moments(FunctionSpace):
    """Base class: weight · Σ over layers of a quadratic form of what has changed in each.

    The matrices of the forms, and each layer's weights in the base run, are whole on every rank.

    Args:
        weight: λ of the penalty.
        control, sequences, rest: as of `FunctionSpace`.
    """

    measures: ClassVar[Measure]

    def __init__(
        self,
        *,
        weight: NonNegativeFloat = 1.0,
        control: Control = "none",
        sequences: PositiveInt = 256,
        rest: Rest = "train",
    ) -> None:
        super().__init__(control=control, sequences=sequences, rest=rest)
        self.weight = weight

    def start(self, previous: "PreviousState | None") -> None:
        """Copy the layers' weights, and make room for the matrices."""
        super().start(previous)
        self.anchors = {}
        self.before: dict[str, Tensor] = {}
        self.moments: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            self.before[name] = self.weights_of(layer).detach().clone()
            self.moments[name] = torch.zeros(
                self.shape_of(layer), dtype=torch.float64, device=self.before[name].device
            )

    def shape_of(self, layer: Any) -> tuple[int, ...]:
        """Of the matrix of a layer's form."""
        return self.measures.shape(layer)

    def weights_of(self, layer: Any) -> Tensor:
        """The weights of the form, whole on every rank."""
        raise NotImplementedError

    def form(self, moment: Tensor, change: Tensor) -> Tensor:
        """The quadratic form of a change of weights, ()."""
        raise NotImplementedError

    def controlled(self, moment: Tensor, generator: torch.Generator) -> Tensor:
        """What was measured, in places by the control."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Measure the old text."""
        measured = self.measure(self.measures)
        for (name, moment), generator in zip(self.moments.items(), self.generators(), strict=True):
            # An expert that no token reaches may change freely.
            if name in measured:
                wanted = measured[name][tuple(slice(size) for size in moment.shape)]
                moment.copy_(self.controlled(wanted, generator))

    def penalty(self, model: "KanLMForCausalLM") -> Tensor:
        """The penalty, ()."""
        terms = [
            self.form(self.moments[name], self.weights_of(layer) - self.before[name])
            for name, layer in self.layers.items()
        ]
        return self.weight * sum(terms[1:], start=terms[0])

    def state_dict(self) -> dict[str, Any]:
        """The matrices, by layer."""
        return {**super().state_dict(), **self.moments}


class _Edges(_Moments):
    """Base class of penalties of edge functions.

    Args:
        weight: λ of the penalty.
        base: what becomes of the base functions' weights: `penalise` counts them as one more
            function of their edges, `freeze` keeps them, and `train` lets them be.
        control, sequences, rest: as of `FunctionSpace`.
    """

    def __init__(
        self,
        *,
        weight: NonNegativeFloat = 1.0,
        base: BaseWeights = "penalise",
        control: Control = "none",
        sequences: PositiveInt = 256,
        rest: Rest = "train",
    ) -> None:
        super().__init__(weight=weight, control=control, sequences=sequences, rest=rest)
        self.base: BaseWeights = base

    def trains(self, name: str) -> bool:
        """What the options say."""
        layer, own = self.place_of(name)
        frozen = self.base == "freeze" and layer is not None and own == "base_weight"
        return not frozen and super().trains(name)

    def shape_of(self, layer: KANLinear) -> tuple[int, ...]:
        """With the base, or without."""
        first, *others = super().shape_of(layer)
        functions = layer.basis.num_functions
        return first, *(size if self.base == "penalise" else functions for size in others)

    def weights_of(self, layer: KANLinear) -> Tensor:
        """Coefficients and, last, the base's weight of each edge, (in, B + 1, out)."""
        coefficients = gathered(layer.coefficients)
        if self.base != "penalise" or layer.base is None or layer.base_weight is None:
            return coefficients
        return torch.cat([coefficients, gathered(layer.base_weight).T.unsqueeze(1)], dim=1)


class OccupancyPenalty(_Edges):
    """Adds weight · Σ O_ib Δc_ibo² to the loss, of the coefficients of KAN layers.

    O_ib = E_old[φ_b(x_i)²] is a Fisher diagonal without the output's gradient.

    Args:
        weight: λ of the penalty.
        base: as of `_Edges`.
        control, sequences, rest: as of `FunctionSpace`.
    """

    name = "occupancy-penalty"
    measures = OCCUPANCY

    def form(self, moment: Tensor, change: Tensor) -> Tensor:
        """Σ O Δc²."""
        return (moment.to(change.dtype).unsqueeze(-1) * change.square()).sum()

    def controlled(self, moment: Tensor, generator: torch.Generator) -> Tensor:
        """O in places by the control."""
        return control_values(moment, self.control, generator)


class Banded(_Edges):
    """Adds weight · Σ_io Δc_ioᵀ M_i Δc_io to the loss, with M_i = E_old[φ(x_i) φ(x_i)ᵀ].

    That is the sum over edges of E_old[(f − f_0)²], exactly as long as inputs keep their
    distribution. M has the bandwidth of the basis' support, and all outputs share it.

    Args:
        weight: λ of the penalty.
        base: as of `_Edges`.
        control, sequences, rest: as of `FunctionSpace`.
    """

    name = "banded"
    measures = PRODUCTS

    def form(self, moment: Tensor, change: Tensor) -> Tensor:
        """Σ Δcᵀ M Δc."""
        return (change * (moment.to(change.dtype) @ change)).sum()

    def controlled(self, moment: Tensor, generator: torch.Generator) -> Tensor:
        """M in places by the control."""
        return control_products(moment, self.control, generator)


class InputCovariance(_Moments):
    """Adds weight · Σ tr(ΔW C ΔWᵀ) to the loss, of the linear maps in feed-forward blocks.

    With C = E_old[x xᵀ] that is the sum over outputs of E_old[(Wx − W_0 x)²]: what `banded` is to
    the edges of a KAN.

    Args:
        weight: λ of the penalty.
        control, sequences, rest: as of `FunctionSpace`.
    """

    name = "input-covariance"
    needs = "a linear map in a feed-forward block"
    measures = COVARIANCE

    def find_layers(self, model: nn.Module) -> dict[str, Any]:
        """The linear maps in feed-forward blocks."""
        return linear_layers(model)

    def weights_of(self, layer: nn.Linear) -> Tensor:
        """(out, in)."""
        return gathered(layer.weight)

    def form(self, moment: Tensor, change: Tensor) -> Tensor:
        """tr(ΔW C ΔWᵀ)."""
        return (change @ moment.to(change.dtype) * change).sum()

    def controlled(self, moment: Tensor, generator: torch.Generator) -> Tensor:
        """C in places by the control."""
        return control_covariance(moment, self.control, generator)
