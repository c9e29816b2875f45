"""Wavelets whose place and scale are learned."""

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from .base import Outside, Smooth
from .cpp_formulas import CppFormulas

Mother = Literal["mexican-hat", "morlet"]

#: Angular frequency of the Morlet wavelet.
_MORLET_FREQUENCY = 5.0
#: 2 / (√3 π^¼), which gives the Mexican hat unit energy.
_MEXICAN_HAT = 2 / (math.sqrt(3) * math.pi**0.25)


class Wavelet(Smooth):
    """φ_b(x) = ψ((x − t_b) / s_b) with learned translations t and scales s (Wav-KAN; Bozorgasl
    and Chen, arXiv 2405.12832, eq. 6-8).

        mexican-hat:  ψ(u) = 2 / (√3 π^¼) (1 − u²) exp(−u² / 2)
        morlet:       ψ(u) = cos(5 u) exp(−u² / 2)

    Each input channel has its own t and s, unless they are shared. The scale is kept positive
    by its logarithm. At the start the wavelets stand equally spaced over the range, as wide
    as their distance (Morlet: three times that, so that several of its waves are seen).

    In bfloat16 a value inside the range is the exact one rounded, within 2⁻⁸ |value| + 10⁻⁵ for
    the parameters as they are (bfloat16 rounds those, too).

    Args:
        wavelets: number of functions.
        mother: ψ.
        half_width: R; the range is (−R, R).
        outside: `linear` or `squash`.
        per_channel: give each of `channels` parameters of its own; otherwise they share.
    """

    translations: Tensor
    log_scales: Tensor

    def __init__(
        self,
        channels: int | None = None,
        *,
        wavelets: int = 4,
        mother: Mother = "mexican-hat",
        half_width: float = 3.0,
        outside: Outside = "linear",
        per_channel: bool = True,
    ) -> None:
        if wavelets < 1:
            raise ValueError(f"wavelets = {wavelets}: expected at least 1")
        if mother not in get_args(Mother):
            raise ValueError(f"mother = {mother!r}: expected {' or '.join(get_args(Mother))}")
        if outside == "periodic":
            raise ValueError("outside = 'periodic': expected linear or squash for wavelets")
        self.mother: Mother = mother
        super().__init__(wavelets, half_width, outside, channels if per_channel else None)
        self.flops_per_input = 8 * wavelets + 3

    @property
    def size_label(self) -> str:
        return f"{self.mother}{self.num_functions}"

    def starting_parameters(self) -> dict[str, Tensor]:
        count = self.num_functions
        step = 2 * self.half_width / (count + 1)
        places = torch.arange(1, count + 1, dtype=torch.float64, device="cpu") * step
        scale = step if self.mother == "mexican-hat" else 3 * step
        return {
            "translations": (places - self.half_width).unsqueeze(-1),
            "log_scales": torch.full(
                (count, 1), math.log(scale), dtype=torch.float64, device="cpu"
            ),
        }

    def functions(self, x: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        columns = []
        for u, _ in self._positions(x, parameters):
            envelope = torch.exp(-u * u / 2)
            if self.mother == "morlet":
                columns.append(torch.cos(_MORLET_FREQUENCY * u) * envelope)
            else:
                columns.append(_MEXICAN_HAT * (1 - u * u) * envelope)
        return columns

    def slopes(self, x: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        columns = []
        for u, scale in self._positions(x, parameters):
            envelope = torch.exp(-u * u / 2)
            if self.mother == "morlet":
                angle = _MORLET_FREQUENCY * u
                slope = -(_MORLET_FREQUENCY * torch.sin(angle) + u * torch.cos(angle)) * envelope
            else:
                slope = _MEXICAN_HAT * (u * u - 3) * u * envelope
            columns.append(slope / scale)
        return columns

    def cpp_formulas(self) -> CppFormulas | None:
        if self.outside != "linear":
            return None
        hat = self.mother == "mexican-hat"
        numbers = (self.half_width, *((_MEXICAN_HAT, 0.0) if hat else (0.0, _MORLET_FREQUENCY)))
        learned = torch.cat([self.translations.float(), (-self.log_scales.float()).exp()])
        return CppFormulas("wavelet", self.num_functions, numbers, learned=learned.detach())

    def _positions(self, x: Tensor, parameters: Mapping[str, Tensor]):
        """(x − t_b) / s_b and s_b, for each wavelet."""
        scales = parameters["log_scales"].exp()
        for place, scale in zip(parameters["translations"], scales, strict=True):
            yield (x - place) / scale, scale
