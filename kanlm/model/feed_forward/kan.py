"""Blocks of Kolmogorov-Arnold layers, in which every edge owns its function."""

from typing import Any, Literal

from torch import Tensor

from ...kan import KANLinear
from ..layers import RMSNorm
from .base import FeedForward
from .basis import make_basis


class KAN(FeedForward):
    """Two KAN layers with an RMS norm between them.

    A basis has a range, so each layer's input is normalised: the first by the norm before
    the block, the second by the inner one.

    Arguments:
        basis: `{"kind": …}` with the options of a class in `kanlm.kan.BASES`.
        base: function beside the basis on every edge.

    Raises:
        ValueError: the basis is unknown or refuses its options.
    """

    def __init__(
        self,
        d_model: int,
        hidden: int,
        output_scale: float,
        *,
        basis: dict[str, Any] = {"kind": "bspline"},  # noqa: B006 (read, never changed)
        base: Literal["silu", "identity"] | None = "silu",
    ) -> None:
        super().__init__(d_model, hidden, output_scale)
        self.up = KANLinear(d_model, hidden, basis=make_basis(basis, d_model), base=base)
        self.norm = RMSNorm(hidden)
        self.down = KANLinear(
            hidden,
            d_model,
            basis=make_basis(basis, hidden),
            base=base,
            gain=output_scale,
        )
        self.label = f"kan/{self.up.label}"

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)))

    @property
    def flops_per_token(self) -> int:
        return sum(layer.flops_per_token for layer in (self.up, self.norm, self.down))
