"""Blocks of Kolmogorov-Arnold layers, in which every edge owns its function."""

import math
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from ...kan import KANLinear
from ...kan.kernels import Edges, prepared_sums
from ...kan.layer import Base, Start
from ...kan.moments import unit_normal_mean
from ...kan.watchable import is_unobserved
from ..layers import Linear, RMSNorm
from .base import FeedForward
from .basis import make_basis

#: The product with a linear map raises the degree by one.
_QUADRATIC = {"kind": "hermite", "degree": 2, "half_width": 4.0, "outside": "linear"}


class KAN(FeedForward):
    """Two KAN layers with an RMS norm between them: down(norm(up(x))).

    A basis has a range, so each layer's input is normalised: the first by the norm before
    the block, the second by the inner one.

    Args:
        basis: `{"kind": …}` with the options of a class in `kanlm.kan.BASES`.
        base: function beside the basis on every edge, as of `KANLinear`.
        start: how the edges' functions start, as of `KANLinear`.

    Raises:
        ValueError: the basis is unknown or refuses its options, or both layers would start
            as 0.
    """

    def __init__(
        self,
        d_model: int,
        hidden: int,
        output_scale: float,
        *,
        basis: dict[str, Any] = {"kind": "hermite"},  # noqa: B006 (read, never changed)
        base: Base = "auto",
        start: Start = "random",
    ) -> None:
        super().__init__(d_model, hidden, output_scale)
        self.up = KANLinear(
            d_model, hidden, basis=make_basis(basis, d_model), base=base, start=start
        )
        if start == "zero" and self.up.base is None:
            raise ValueError("start = 'zero' needs a base: the inner norm would divide by zero")
        self.norm = RMSNorm(hidden)
        self.down = KANLinear(
            hidden,
            d_model,
            basis=make_basis(basis, hidden),
            base=base,
            gain=output_scale,
            start=start,
        )
        self.label = f"kan/{self.up.label}"

    def forward(self, x: Tensor) -> Tensor:
        y = prepared_sums(self, x)
        return self.down(self.norm(self.up(x))) if y is None else y

    def decoding_layers(self) -> list[Edges] | None:
        """See `kanlm.kan.decoding`."""
        kinds = {"up": KANLinear, "norm": RMSNorm, "down": KANLinear}
        if not all(is_unobserved(self.get_submodule(name), kind) for name, kind in kinds.items()):
            return None
        return [self.up.edges(), self.down.edges((self.norm.weight, self.norm.epsilon))]

    @property
    def flops_per_token(self) -> int:
        return sum(layer.flops_per_token for layer in (self.up, self.norm, self.down))


class KANLocal(KAN):
    """`KAN` with local functions: linear B-splines beside SiLU.

    The best local basis in the comparison of configs/README.md. One input touches two of an
    edge's coefficients: they can be refined, read one by one in decoding, and learned
    without changing what the edge does elsewhere.

    Args: as of `KAN`.
    """

    def __init__(
        self,
        d_model: int,
        hidden: int,
        output_scale: float,
        *,
        basis: dict[str, Any] = {"kind": "bspline"},  # noqa: B006 (read, never changed)
        base: Base = "silu",
        start: Start = "random",
    ) -> None:
        super().__init__(d_model, hidden, output_scale, basis=basis, base=base, start=start)


class KANGLU(FeedForward):
    """A gated linear unit (Shazeer, arXiv 2002.05202) with a KAN layer for one of its maps.

        learned = "gate":   y = down(kan(x) ⊙ linear(x))
        learned = "value":  y = down(kan(x) ⊙ silu(linear(x)))

    with `down` linear. The products are those of SwiGLU, silu(linear) ⊙ linear, with the
    gate, its activation included, or the value replaced by functions learned edge by edge.

    Args:
        learned: which of the two factors is the KAN layer.
        basis, base, start: as of `KAN`.

    Raises:
        ValueError: an option is unknown, or the basis refuses its options.
    """

    def __init__(
        self,
        d_model: int,
        hidden: int,
        output_scale: float,
        *,
        learned: Literal["gate", "value"] = "gate",
        basis: dict[str, Any] = _QUADRATIC,
        base: Base = "auto",
        start: Start = "random",
    ) -> None:
        super().__init__(d_model, hidden, output_scale)
        if learned not in ("gate", "value"):
            raise ValueError(f"learned = {learned!r}: expected gate or value")
        self.learned = learned
        self.kan = KANLinear(
            d_model, hidden, basis=make_basis(basis, d_model), base=base, start=start
        )
        self.linear = Linear(d_model, hidden)
        # The factors' weights are independent: the mean square of the product is the
        # product of theirs, and the KAN's is 1.
        square = 1.0 if learned == "gate" else unit_normal_mean(lambda z: F.silu(z).square())
        self.down = Linear(hidden, d_model, gain=output_scale / math.sqrt(square))
        self.label = f"kan-glu-{learned}/{self.kan.label}"

    def forward(self, x: Tensor) -> Tensor:
        other = self.linear(x)
        if self.learned == "value":
            other = F.silu(other)
        return self.down(self.kan(x) * other)

    @property
    def flops_per_token(self) -> int:
        layers = sum(layer.flops_per_token for layer in (self.kan, self.linear, self.down))
        return layers + (1 if self.learned == "gate" else 5) * self.hidden


class KANSingle(FeedForward):
    """One KAN layer from width d to d. It has no inner width.

    Args:
        basis, base, start: as of `KAN`; with `start: zero` and no base the block starts as 0.

    Raises:
        ValueError: the basis is unknown or refuses its options.
    """

    has_width: ClassVar[bool] = False

    def __init__(
        self,
        d_model: int,
        hidden: int,
        output_scale: float,
        *,
        basis: dict[str, Any] = {"kind": "hermite"},  # noqa: B006 (read, never changed)
        base: Base = "auto",
        start: Start = "random",
    ) -> None:
        super().__init__(d_model, hidden, output_scale)
        self.layer = KANLinear(
            d_model,
            d_model,
            basis=make_basis(basis, d_model),
            base=base,
            gain=output_scale,
            start=start,
        )
        self.label = f"kan-single/{self.layer.label}"

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    @property
    def flops_per_token(self) -> int:
        return self.layer.flops_per_token
