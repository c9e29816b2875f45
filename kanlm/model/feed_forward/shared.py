"""Blocks whose learned functions are shared by the edges: between an MLP and a KAN.

None of them is a KAN in which every edge owns its function; reports keep the two apart by
label. They tell what learned activations give from what functions on edges give.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...kan import SharedFunctionLinear, SharedFunctions
from ...kan.shared import SharedStart
from ..layers import Linear, RMSNorm
from .base import FeedForward
from .basis import make_basis


class SplineMLP(FeedForward):
    """An MLP whose activation is learned, one spline a hidden channel: the control that
    tells the merit of learned activations from that of functions on edges (as in KANbeFair,
    Yu et al., arXiv 2407.16674).

        y = down(f(up(x))),   with `gate`   y = down(f(gate(x)) ⊙ up(x))

    with linear maps, so that it differs from an MLP, or from SwiGLU, in nothing else. Each
    f_i starts as SiLU: by the default spline to 0.001 within its grid, and at twice the
    grid's range to 0.11.

    Args:
        basis: `{"kind": …}` with the options of a class in `kanlm.kan.BASES`.
        gate: make it a gated linear unit.

    Raises:
        ValueError: the basis is unknown or refuses its options.
    """

    def __init__(
        self,
        d_model: int,
        hidden: int,
        output_scale: float,
        *,
        basis: dict[str, Any] = {  # noqa: B006 (read, never changed)
            "kind": "bspline",
            "degree": 3,
            "grid_size": 8,
        },
        gate: bool = False,
    ) -> None:
        super().__init__(d_model, hidden, output_scale)
        self.gate = Linear(d_model, hidden) if gate else None
        self.up = Linear(d_model, hidden)
        self.activation = SharedFunctions(hidden, basis=make_basis(basis, hidden), start="silu")
        gain = output_scale / math.sqrt(self.activation.mean_square)
        self.down = Linear(hidden, d_model, gain=gain)
        self.label = f"spline-mlp{'-gate' if gate else ''}/{self.activation.basis.label}"

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))

    @property
    def flops_per_token(self) -> int:
        parts = self.up.flops_per_token + self.down.flops_per_token
        if self.gate is not None:
            parts += self.gate.flops_per_token + self.hidden
        return parts + self.activation.flops_per_token


class KAT(FeedForward):
    """The block of the Kolmogorov-Arnold transformer (Yang & Wang, arXiv 2409.10594, sec. 4).

    Two group-rational layers, each a rational function a group of channels and then a
    linear map with bias,

        y = L₂(F₂(L₁(F₁(x)))),   F(x_i) = P_g(x_i) / (1 + |Q_g(x_i)|)   for i in group g

    with deg P = 5, deg Q = 4 and 8 groups, each with a P and a Q of its own. As in the
    paper F₁ starts as the identity, here exactly, and F₂ as GELU, here to 0.015 on
    [-10, 10].

    Args:
        basis: `{"kind": …}` with the options of a class in `kanlm.kan.BASES`. The default's
            half_width is the one with which its starting denominator fits GELU best.
        groups: groups of channels. It must divide d_model and `hidden`.

    Raises:
        ValueError: `groups` does not divide a width, or the basis refuses its options.
    """

    def __init__(
        self,
        d_model: int,
        hidden: int,
        output_scale: float,
        *,
        basis: dict[str, Any] = {  # noqa: B006 (read, never changed)
            "kind": "rational",
            "numerator": 5,
            "denominator": 4,
            "half_width": 2.5,
        },
        groups: int = 8,
    ) -> None:
        super().__init__(d_model, hidden, output_scale)
        self.up = SharedFunctionLinear(
            d_model,
            hidden,
            basis=make_basis(basis, groups),
            groups=groups,
            start="identity",
            bias=True,
        )
        self.down = SharedFunctionLinear(
            hidden,
            d_model,
            basis=make_basis(basis, groups),
            groups=groups,
            start="gelu",
            bias=True,
            gain=output_scale,
        )
        self.label = f"kat/{self.up.functions.basis.label}-groups{groups}"

    @classmethod
    def width_multiple(cls, options: Mapping[str, Any]) -> int:
        return options["groups"]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))

    @property
    def flops_per_token(self) -> int:
        return self.up.flops_per_token + self.down.flops_per_token


class LowRankKAN(FeedForward):
    """Two layers of R shared functions a channel, with an RMS norm between them: as `KAN`,
    with the edges that leave a channel confined to combinations of R functions.

    Args:
        basis: `{"kind": …}` with the options of a class in `kanlm.kan.BASES`.
        rank: R, from 1 to the number of the basis's functions.
        groups: groups of channels that share their functions; None gives each channel its
            own. It must divide d_model and `hidden`.
        start: how the functions start, as of `SharedFunctions`.

    Raises:
        ValueError: `rank` or `groups` is impossible, or the basis refuses its options.
    """

    def __init__(
        self,
        d_model: int,
        hidden: int,
        output_scale: float,
        *,
        basis: dict[str, Any] = {"kind": "bspline"},  # noqa: B006 (read, never changed)
        rank: int = 2,
        groups: int | None = None,
        start: SharedStart = "random",
    ) -> None:
        super().__init__(d_model, hidden, output_scale)

        def layer(in_features: int, out_features: int, gain: float) -> SharedFunctionLinear:
            return SharedFunctionLinear(
                in_features,
                out_features,
                basis=make_basis(basis, in_features if groups is None else groups),
                rank=rank,
                groups=groups,
                start=start,
                gain=gain,
            )

        self.up = layer(d_model, hidden, 1.0)
        self.norm = RMSNorm(hidden)
        self.down = layer(hidden, d_model, output_scale)
        # Groups as stated, because every channel of its own is another number in each layer.
        sharing = f"rank{rank}" if groups is None else f"rank{rank}-groups{groups}"
        self.label = f"lowrank-kan/{self.up.functions.basis.label}-{sharing}"

    @classmethod
    def width_multiple(cls, options: Mapping[str, Any]) -> int:
        return options["groups"] or 1

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)))

    @property
    def flops_per_token(self) -> int:
        return sum(layer.flops_per_token for layer in (self.up, self.norm, self.down))
