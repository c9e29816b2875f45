"""Functions given by a small neural network."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .base import Outside, Smooth
from .cpp_formulas import CppFormulas

#: Hidden units for which implicit.cpp has room.
_MOST_UNITS = 64


class Implicit(Smooth):
    """A network R → R^B with one hidden layer, the same for every input channel.

        φ_b(x) = Σ_h a_bh silu(w_h (x − t_h)),   h = 1 … hidden

    It learns a basis where the others state one, in 2 hidden + B hidden parameters for the
    whole layer. At the start the units stand equally spaced over the range and the rows of
    a are the discrete cosine transform's, so that no two functions are alike.

    In bfloat16 a value inside the range is the exact one rounded, within 2⁻⁸ |value| + 10⁻⁵ for
    the parameters as they are (bfloat16 rounds those, too).

    Args:
        outputs: B.
        hidden: units.
        half_width: R; the range is (−R, R).
        outside: `linear` or `squash`.
    """

    places: Tensor
    slants: Tensor
    mixture: Tensor

    def __init__(
        self,
        channels: int | None = None,
        *,
        outputs: int = 4,
        hidden: int = 8,
        half_width: float = 3.0,
        outside: Outside = "linear",
    ) -> None:
        if outputs < 1:
            raise ValueError(f"outputs = {outputs}: expected at least 1")
        if hidden <= outputs:
            raise ValueError(f"hidden = {hidden}: expected more than outputs = {outputs}")
        if outside == "periodic":
            raise ValueError("outside = 'periodic': expected linear or squash for implicit")
        self.hidden = hidden
        super().__init__(outputs, half_width, outside)
        self.flops_per_input = 7 * hidden + 2 * hidden * outputs + 3

    @property
    def size_label(self) -> str:
        return f"implicit{self.num_functions}-h{self.hidden}"

    def starting_parameters(self) -> dict[str, Tensor]:
        count, width = self.hidden, 2 * self.half_width
        steps = torch.arange(count, dtype=torch.float64, device="cpu") + 0.5
        orders = torch.arange(1, self.num_functions + 1, dtype=torch.float64, device="cpu")
        cosines = torch.cos(math.pi / count * orders.unsqueeze(-1) * steps)
        return {
            "places": (steps / count * width - self.half_width).unsqueeze(-1),
            "slants": torch.full((count, 1), 2 * count / width, dtype=torch.float64, device="cpu"),
            "mixture": (math.sqrt(2 / count) * cosines).reshape(-1, 1),
        }

    def functions(self, x: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        units = [torch.nn.functional.silu(u) for u, _ in self._units(x, parameters)]
        return self._mixed(units, parameters)

    def slopes(self, x: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        units = []
        for u, slant in self._units(x, parameters):
            gate = torch.sigmoid(u)
            units.append(slant * gate * (1 + u * (1 - gate)))
        return self._mixed(units, parameters)

    def cpp_formulas(self) -> CppFormulas | None:
        if self.outside != "linear" or self.hidden > _MOST_UNITS:
            return None
        parts = self.places, self.slants, self.mixture
        learned = torch.cat([part.detach().float() for part in parts])
        numbers = self.half_width, float(self.hidden)
        return CppFormulas("implicit", self.num_functions, numbers, learned=learned)

    def _units(self, x: Tensor, parameters: Mapping[str, Tensor]):
        for place, slant in zip(parameters["places"], parameters["slants"], strict=True):
            yield slant * (x - place), slant

    def _mixed(self, units: list[Tensor], parameters: Mapping[str, Tensor]) -> list[Tensor]:
        # One product over the hidden units: (…, in, hidden) @ (hidden, B).
        weights = parameters["mixture"].view(self.num_functions, self.hidden)
        return list((torch.stack(units, dim=-1) @ weights.T).unbind(-1))
