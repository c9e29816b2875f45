"""Layers whose functions are shared by the edges: what lies between an MLP and a KAN.

In a KAN every edge owns its function (`KANLinear`). Here an input channel, or a group of
channels, owns R functions, and a linear map mixes them: all edges that leave a channel
carry combinations of the same R. With R = 1 that is an MLP with learned activations; with
R = B, the number of basis functions, every edge can have any function that a KAN's could.
"""

from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .bases import Basis, BSpline
from .initialization import assign_, uniform_
from .moments import unit_normal_mean, unit_normal_products, unit_normal_projection
from .sharding import whole_like

#: How shared functions start: as this function, or drawn.
SharedStart = Literal["silu", "gelu", "identity", "random"]
_TARGETS = {"silu": F.silu, "gelu": F.gelu, "identity": lambda z: z}


class SharedFunctions(nn.Module):
    """R learned functions of every channel, which the channels of a group share:

        f_gr(x) = Σ_b c_gbr φ_b(x)

    Neighbouring channels form a group, the first channels / groups the first, and so on.

    Starts: the name of a function starts all functions as the combination nearest to it
    (least squares under a unit normal); `random` draws each on its own, scaled so that a
    unit normal input gives it mean square 1.

    Args:
        channels: inputs.
        basis: evaluates φ; `BSpline()` when not given. One with parameters or a grid of its
            own may hold one set a group.
        rank: R, from 1 to B.
        groups: groups of channels; None gives every channel its functions, 1 gives all the
            same.
        start: the function that all start as, or `random` combinations.

    Shapes: (…, channels) → (…, rank · channels), the first function of all channels first.

    Raises:
        ValueError: an option is out of its range, `groups` does not divide `channels`, the
            basis is of another number of channels, or it can make nothing like the start.
    """

    #: Part of a starting function's mean square that a basis must reach.
    LEAST_LIKENESS = 0.1

    def __init__(
        self,
        channels: int,
        *,
        basis: Basis | None = None,
        rank: int = 1,
        groups: int | None = None,
        start: SharedStart = "silu",
    ) -> None:
        super().__init__()
        self.basis = BSpline() if basis is None else basis
        self.channels = channels
        self.rank = rank
        self.groups = channels if groups is None else groups
        self.start: SharedStart = start
        if start not in get_args(SharedStart):
            raise ValueError(f"start = {start!r}: expected {', '.join(get_args(SharedStart))}")
        if self.groups < 1 or channels % self.groups:
            raise ValueError(f"groups = {groups} does not divide the {channels} channels")
        if not 1 <= rank <= self.basis.num_functions:
            raise ValueError(
                f"rank = {rank}: expected 1 to {self.basis.num_functions}, "
                "the number of basis functions"
            )
        if self.basis.channels not in (None, self.groups):
            raise ValueError(
                f"the basis has parameters for {self.basis.channels} channels, "
                f"and there are {self.groups} groups"
            )
        shape = (self.groups, self.basis.num_functions, rank)
        self.coefficients = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.start == "random":
            drawn = whole_like(self.coefficients)
            uniform_(drawn, 1.0)
            products = drawn.new_tensor(unit_normal_products(self.basis.starting_values))
            squares = torch.einsum("gbr,bc,gcr->gr", drawn, products, drawn)
            assign_(self.coefficients, drawn * squares.rsqrt().unsqueeze(1))
        else:
            target = unit_normal_mean(lambda z: _TARGETS[self.start](z).square())
            if self.mean_square < self.LEAST_LIKENESS * self.rank * target:
                raise ValueError(
                    f"start = {self.start!r}: no combination of the functions of "
                    f"{self.basis.label} is like it; expected random"
                )
            start = torch.tensor(self._fit, dtype=torch.float64, device="cpu")
            assign_(self.coefficients, start.unsqueeze(-1))

    @cached_property
    def _fit(self) -> list[float]:
        """The B coefficients nearest to the function that all start as."""
        return unit_normal_projection(self.basis.starting_values, _TARGETS[self.start])

    @cached_property
    def mean_square(self) -> float:
        """E[Σ_r f_r(z)²] of one channel for z ~ N(0, 1) at the start."""
        if self.start == "random":
            return float(self.rank)
        return self.rank * unit_normal_mean(
            lambda z: (self.basis.starting_values(z) @ z.new_tensor(self._fit)).square()
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.channels:
            raise ValueError(f"x has {x.shape[-1]} channels: expected {self.channels}")
        # Function by function of the basis, because a product with a matrix a channel, B by
        # R and tiny, would run at a fraction of the speed.
        mixture = self.coefficients.to(x.dtype).permute(1, 2, 0)
        mixture = mixture.repeat_interleave(self.channels // self.groups, dim=-1)
        total: Tensor | None = None
        for value, weights in zip(self._values(x), mixture, strict=True):
            value = value.unsqueeze(-2)
            total = value * weights if total is None else torch.addcmul(total, value, weights)
        assert total is not None
        return total.flatten(-2)

    def _values(self, x: Tensor) -> tuple[Tensor, ...]:
        """Values of each basis function, (…, channels) each."""
        if self.basis.channels is None or self.groups == self.channels:
            return self.basis.values(x).unbind(-1)
        # A basis of one set a group sees the groups as its channels.
        members = x.unflatten(-1, (self.groups, -1)).transpose(-1, -2)
        grouped = self.basis.values(members).unbind(-1)
        return tuple(value.transpose(-1, -2).flatten(-2) for value in grouped)

    @property
    def label(self) -> str:
        """Basis, rank and groups, such as `bspline1-g6-rank2` or `rational5-4-rank1-groups8`."""
        groups = "" if self.groups == self.channels else f"-groups{self.groups}"
        return f"{self.basis.label}-rank{self.rank}{groups}"

    @property
    def flops_per_token(self) -> int:
        """Those of the basis, and a multiply-add for every coefficient of every channel."""
        mixture = 2 * self.basis.num_functions * self.rank
        return self.channels * (self.basis.flops_per_input + mixture)

    def extra_repr(self) -> str:
        return (
            f"channels={self.channels}, rank={self.rank}, groups={self.groups}, start={self.start}"
        )


class SharedFunctionLinear(nn.Module):
    """A linear map of shared functions of the inputs:

        y_o = Σ_i Σ_r w_oir f_{g(i),r}(x_i) + bias_o,   f_gr = Σ_b c_gbr φ_b

    With rank 1 and few groups of rational functions it is the group-rational KAN layer of
    the Kolmogorov-Arnold transformer (Yang & Wang, arXiv 2409.10594, sec. 4). It is no KAN
    in the sense of `KANLinear`, whose edges own their functions, unless rank = B and every
    channel is its own group: then the functions c φ span all that the basis does, and w
    holds the coefficients of every edge.

    For unit-normal inputs the outputs start with E[y_o²] = gain² over the draw of w.

    Args:
        in_features, out_features: channels.
        basis, rank, groups, start: as of `SharedFunctions`.
        bias: add a learned constant; None adds one unless the basis spans constants.
        gain: starting scale of the output.

    Shapes: (…, in_features) → (…, out_features). `weight` is (out, rank · in), w_oir at
    [o, r · in + i]; `functions.coefficients` is (groups, B, rank).

    Raises:
        ValueError: as of `SharedFunctions`.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        basis: Basis | None = None,
        rank: int = 1,
        groups: int | None = None,
        start: SharedStart = "silu",
        bias: bool | None = None,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.gain = gain
        self.functions = SharedFunctions(
            in_features, basis=basis, rank=rank, groups=groups, start=start
        )
        self.weight = nn.Parameter(torch.empty(out_features, rank * in_features))
        has_bias = not self.functions.basis.spans_constants if bias is None else bias
        self.bias = nn.Parameter(torch.empty(out_features)) if has_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw w; the functions reset themselves."""
        uniform_(self.weight, self.gain**2 / (self.in_features * self.functions.mean_square))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.functions(x), self.weight, self.bias)

    @property
    def label(self) -> str:
        return self.functions.label

    @property
    def flops_per_token(self) -> int:
        """FLOPs of one input vector, a multiply-add counting two."""
        bias = 0 if self.bias is None else self.out_features
        return self.functions.flops_per_token + 2 * self.weight.numel() + bias

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, gain={self.gain:g}"
        )
