"""KANLinear: a layer whose every edge carries a learned function of one variable."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .base_functions import BASE_FLOPS, BASE_FUNCTIONS, BaseFunction
from .bases import Basis, Hermite
from .initialization import assign_, uniform_
from .kernels import Edges, edge_sums, prepared_sums
from .moments import unit_normal_mean
from .watchable import Watchable

#: How a layer's edge functions start.
Start = Literal["random", "linear", "zero"]
#: The function beside the basis; `auto` is the basis's `default_base`.
Base = BaseFunction | Literal["auto"] | None


class KANLinear(Watchable):
    """Kolmogorov-Arnold layer (Liu et al., arXiv 2404.19756, eq. 2.10-2.12).

    Output o is the sum over inputs i of an edge function of x_i:

        y_o = Σ_i [ Σ_b c_ibo φ_b(x_i) + w_oi base(x_i) ] + bias_o

    so a KAN layer is a basis expansion followed by a wide linear map. Every edge owns its
    function.

    Starts, each with E[y_o²] = gain² over the draw of the weights for unit-normal inputs:

    - `random`: independent coefficients. Where there is a base the basis carries BASIS_SHARE
      of the variance, so that the layer starts near to an MLP's and learns its shapes from
      there.
    - `linear`: every edge's function is as near to a straight line through 0 as the basis
      can be (least squares under a unit normal), and the base's weight is 0.
    - `zero`: all coefficients are 0. The base carries all the variance; without one the
      layer starts as 0.

    Args:
        in_features, out_features: channels.
        basis: evaluates φ; `Hermite()` when not given (configs/README.md has the comparison).
        base: function beside the basis that keeps gradients alive everywhere, or None;
            `auto` takes the basis's own choice.
        bias: add a learned constant; None adds one unless the basis spans constants.
        gain: starting scale of the output.
        start: `random` draws the coefficients, `linear` starts every edge as a line, `zero` leaves
            all to the base.

    Shapes: (…, in_features) → (…, out_features).

    Raises:
        ValueError: a size is less than 1, base or start is unknown, the basis is none or of
            another number of channels, or start is `linear` and the basis can make no line.
    """

    #: Part of the starting variance that the basis carries beside a base.
    BASIS_SHARE = 0.1
    #: Part of a line's variance that a basis must reach for the `linear` start.
    LEAST_LIKENESS = 0.1

    base_weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        basis: Basis | None = None,
        base: Base = "auto",
        bias: bool | None = None,
        gain: float = 1.0,
        start: Start = "random",
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(
                f"in_features = {in_features}, out_features = {out_features}: expected at least 1"
            )
        if base is not None and base not in ("auto", *BASE_FUNCTIONS):
            raise ValueError(f"base = {base!r}: expected auto, silu, identity or None")
        if basis is not None and not isinstance(basis, Basis):
            raise ValueError(f"basis = {basis!r}: expected a Basis, such as Hermite(degree=3)")
        if start not in get_args(Start):
            raise ValueError(f"start = {start!r}: expected {', '.join(get_args(Start))}")
        self.in_features = in_features
        self.out_features = out_features
        self.basis = Hermite() if basis is None else basis
        self.base: BaseFunction | None = self.basis.default_base if base == "auto" else base
        self.gain = gain
        self.start: Start = start
        shape = (in_features, self.basis.num_functions, out_features)
        self.coefficients = nn.Parameter(torch.empty(shape))
        base_weight = nn.Parameter(torch.empty(out_features, in_features)) if self.base else None
        # Registered where there is none, too, so that one given later stands in the same place.
        self.register_parameter("base_weight", base_weight)
        if self.basis.channels not in (None, in_features):
            raise ValueError(
                f"the basis has parameters for {self.basis.channels} channels, "
                f"and in_features = {in_features}"
            )
        has_bias = not self.basis.spans_constants if bias is None else bias
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features)) if has_bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights that give unit-normal inputs the output variance gain²."""
        variance = self.gain**2 / self.in_features
        share = {"random": 1.0 if self.base_weight is None else self.BASIS_SHARE, "linear": 1.0}
        self._start_coefficients(share.get(self.start, 0.0) * variance)
        if self.base is not None and self.base_weight is not None:
            function = BASE_FUNCTIONS[self.base]
            rest = 1 - share.get(self.start, 0.0)
            mean_square = unit_normal_mean(lambda z: function(z).square())
            uniform_(self.base_weight, rest * variance / mean_square)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _start_coefficients(self, variance: float) -> None:
        """Draw coefficients whose edge functions have this mean square."""
        if self.start == "linear":
            slopes = torch.empty(
                self.in_features, 1, self.out_features, device=self.coefficients.device
            )
            line = self.basis.identity_coefficients
            square = unit_normal_mean(
                lambda z: (self.basis.starting_values(z) @ z.new_tensor(line)).square()
            )
            if square < self.LEAST_LIKENESS:
                raise ValueError(
                    f"start = 'linear': no combination of the functions of {self.basis.label} "
                    "is like a line; expected random or zero"
                )
            uniform_(slopes, variance / square)
            assign_(self.coefficients, slopes * slopes.new_tensor(line).unsqueeze(-1))
        else:
            uniform_(self.coefficients, variance / self.basis.mean_square)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x has {x.shape[-1]} channels: expected {self.in_features}")
        y = prepared_sums(self, x)
        if y is not None:
            return y
        return edge_sums(x, self.coefficients, self.basis, self.base, self.base_weight, self.bias)

    def edges(self, norm: tuple[Tensor, float] | None = None) -> Edges:
        """What `forward` adds up.

        Args:
            norm: gain (in,) and epsilon of an RMS norm that the inputs go through first.
        """
        weight = None if self.base is None else self.base_weight
        return Edges(self.coefficients, self.basis, self.base, weight, self.bias, norm)

    def decoding_layers(self) -> list[Edges]:
        """See `kanlm.kan.decoding`."""
        return [self.edges()]

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
            per_input += BASE_FLOPS[self.base]
        bias = 0 if self.bias is None else self.out_features
        return matrix + self.in_features * per_input + bias

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"base={self.base}, bias={self.bias is not None}, gain={self.gain:g}"
        )
