"""KANLinear: a layer whose every edge carries a learned function of one variable."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .bases import Basis, BSpline
from .moments import unit_normal_mean

#: FLOPs of the base function at one input, counted as `Basis.flops_per_input`.
_BASE_FLOPS = {"silu": 4, "identity": 0}


class KANLinear(nn.Module):
    """Kolmogorov-Arnold layer (Liu et al., arXiv 2404.19756, eq. 2.10-2.12).

    Output o is the sum over inputs i of an edge function of x_i:

        y_o = Σ_i [ Σ_b c_ibo φ_b(x_i) + w_oi base(x_i) ] + bias_o

    so a KAN layer is a basis expansion followed by a wide linear map. It keeps variance:
    for unit-normal inputs E[y_o²] = gain² over the draw of the weights. Of that the basis
    carries SPLINE_SHARE where there is a base, so that the layer starts near to an MLP's
    and learns its shapes from there.

    Arguments:
        in_features, out_features: channels.
        basis: evaluates φ; `BSpline()` when not given.
        base: function beside the basis that keeps gradients alive everywhere, or None.
        bias: add a learned constant. A basis whose functions sum to one (B-splines)
            spans constants, and needs none.
        gain: starting scale of the output.

    Shapes: (…, in_features) → (…, out_features).

    Raises:
        ValueError: base is unknown.
    """

    #: Part of the starting variance that the basis carries beside a base.
    SPLINE_SHARE = 0.1

    base_weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        basis: Basis | None = None,
        base: Literal["silu", "identity"] | None = "silu",
        bias: bool = True,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        if base is not None and base not in _BASE_FLOPS:
            raise ValueError(f"base = {base!r}: expected silu, identity or None")
        self.in_features = in_features
        self.out_features = out_features
        self.basis = BSpline() if basis is None else basis
        self.base = base
        self.gain = gain
        shape = (in_features, self.basis.num_functions, out_features)
        self.coefficients = nn.Parameter(torch.empty(shape))
        self.base_weight = (
            None if base is None else nn.Parameter(torch.empty(out_features, in_features))
        )
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights that give unit-normal inputs the output variance gain²."""
        share = self.SPLINE_SHARE if self.base_weight is not None else 1.0
        variance = self.gain**2 / self.in_features
        _uniform_(self.coefficients, share * variance / self.basis.mean_square)
        if self.base_weight is not None:
            mean_square = unit_normal_mean(lambda z: self._base(z).square())
            _uniform_(self.base_weight, (1 - share) * variance / mean_square)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.basis.contract(x, self.coefficients)
        if self.base_weight is not None:
            y = y + F.linear(self._base(x), self.base_weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _base(self, x: Tensor) -> Tensor:
        return F.silu(x) if self.base == "silu" else x

    @property
    def label(self) -> str:
        """Basis and base, such as `bspline1-g6-silu`."""
        return self.basis.label if self.base is None else f"{self.basis.label}-{self.base}"

    @property
    def flops_per_token(self) -> int:
        """FLOPs of one input vector, a multiply-add counting two.

        The dense product counts all B functions, although a local basis is zero in most;
        evaluating basis and base counts one for each operation of their formulas.
        """
        matrix = 2 * self.coefficients.numel()
        per_input = self.basis.flops_per_input
        if self.base is not None and self.base_weight is not None:
            matrix += 2 * self.base_weight.numel() + self.out_features
            per_input += _BASE_FLOPS[self.base]
        bias = 0 if self.bias is None else self.out_features
        return matrix + self.in_features * per_input + bias

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"base={self.base}, bias={self.bias is not None}, gain={self.gain:g}"
        )


def _uniform_(parameter: nn.Parameter, variance: float) -> None:
    bound = math.sqrt(3 * variance)
    nn.init.uniform_(parameter, -bound, bound)
