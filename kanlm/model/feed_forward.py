"""Feed-forward kinds: what stands between two residual additions, from width d to d.

Every kind starts variance-preserving: inputs of mean square 1, which the norm before the
block provides, give outputs of variance output_scale². A comparison of kinds is worth
little when one of them starts badly.

Adding a kind is one subclass of `FeedForward` and one line in `FEED_FORWARDS`; its options
are the keyword-only arguments of its `__init__`, annotated and with defaults.
"""

import difflib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ..kan import BASES, Basis, KANLinear
from ..kan.moments import unit_normal_mean
from .layers import Linear, RMSNorm


class FeedForward(nn.Module, ABC):
    """A map (…, d_model) → (…, d_model) through `hidden` channels.

    Arguments:
        d_model: width of the residual stream.
        hidden: inner width, the one number that matching solves for.
        output_scale: root mean square of the output at the start.
    """

    #: Structure and basis, such as `kan/bspline1-g6-silu`: a changed default then never
    #: changes what an old result means.
    label: str

    def __init__(self, d_model: int, hidden: int, output_scale: float) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden = {hidden}: expected at least 1")
        self.d_model = d_model
        self.hidden = hidden
        self.output_scale = output_scale

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...

    @property
    @abstractmethod
    def flops_per_token(self) -> int:
        """Forward FLOPs, a multiply-add counting two, an elementwise operation one."""

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and callable(reset):
                reset()


class _MLP(FeedForward):
    """Linear, activation, linear."""

    #: FLOPs of the activation at one channel.
    activation_flops: ClassVar[int]

    def __init__(self, d_model: int, hidden: int, output_scale: float) -> None:
        super().__init__(d_model, hidden, output_scale)
        mean_square = unit_normal_mean(lambda z: self.activation(z).square())
        self.up = Linear(d_model, hidden)
        self.down = Linear(hidden, d_model, gain=output_scale / math.sqrt(mean_square))

    @staticmethod
    @abstractmethod
    def activation(x: Tensor) -> Tensor: ...

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))

    @property
    def flops_per_token(self) -> int:
        linear = self.up.flops_per_token + self.down.flops_per_token
        return linear + self.hidden * self.activation_flops


class GELU(_MLP):
    """MLP with the exact GELU (Hendrycks & Gimpel, arXiv 1606.08415)."""

    label = "gelu"
    activation_flops = 5

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        return F.gelu(x)


class ReLU2(_MLP):
    """MLP with the squared ReLU (So et al., arXiv 2109.08668)."""

    label = "relu2"
    activation_flops = 2

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        return F.relu(x).square()


class SwiGLU(FeedForward):
    """SiLU of one linear map times another, then a third (Shazeer, arXiv 2002.05202)."""

    label = "swiglu"

    def __init__(self, d_model: int, hidden: int, output_scale: float) -> None:
        super().__init__(d_model, hidden, output_scale)
        mean_square = unit_normal_mean(lambda z: F.silu(z).square())
        self.gate = Linear(d_model, hidden)
        self.up = Linear(d_model, hidden)
        self.down = Linear(hidden, d_model, gain=output_scale / math.sqrt(mean_square))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))

    @property
    def flops_per_token(self) -> int:
        linear = sum(layer.flops_per_token for layer in (self.gate, self.up, self.down))
        return linear + 5 * self.hidden


class KAN(FeedForward):
    """Two KAN layers with an RMS norm between them.

    A basis has a range, so each layer's input is normalised: the first by the norm before
    the block, the second by the inner one. The layers have no bias: B-splines sum to one
    and span constants already.

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
        self.up = KANLinear(d_model, hidden, basis=_make_basis(basis), base=base, bias=False)
        self.norm = RMSNorm(hidden)
        self.down = KANLinear(
            hidden,
            d_model,
            basis=_make_basis(basis),
            base=base,
            bias=False,
            gain=output_scale,
        )
        self.label = f"kan/{self.up.label}"

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)))

    @property
    def flops_per_token(self) -> int:
        return sum(layer.flops_per_token for layer in (self.up, self.norm, self.down))


#: Feed-forward kinds by the `kind` of their settings.
FEED_FORWARDS: dict[str, type[FeedForward]] = {
    "gelu": GELU,
    "relu2": ReLU2,
    "swiglu": SwiGLU,
    "kan": KAN,
}


def complete_feed_forward(spec: Mapping[str, Any]) -> dict[str, Any]:
    """State every option of `{"kind": …, "hidden": …, **options}`, defaults included.

    A saved model then means the same when a default has changed.

    Raises:
        ValueError: the kind, an option, or the basis is unknown.
    """
    completed = _complete("feed_forward", FEED_FORWARDS, spec)
    if "basis" in completed:
        completed["basis"] = _complete("feed_forward.basis", BASES, completed["basis"])
    return completed


def make_feed_forward(spec: Mapping[str, Any], d_model: int, output_scale: float) -> FeedForward:
    """Build the block that `{"kind": …, "hidden": …, **options}` describes.

    Raises:
        ValueError: the kind or an option is unknown, or `hidden` is missing.
    """
    options = complete_feed_forward(spec)
    kind, hidden = options.pop("kind"), options.pop("hidden", None)
    if hidden is None:
        raise ValueError(f"feed_forward of kind {kind!r} states no hidden width")
    return FEED_FORWARDS[kind](d_model, hidden, output_scale, **options)


def _make_basis(spec: Mapping[str, Any]) -> Basis:
    options = _complete("basis", BASES, spec)
    return BASES[options.pop("kind")](**options)


def _complete(
    setting: str, registry: Mapping[str, type], spec: Mapping[str, Any]
) -> dict[str, Any]:
    """Lay the options of `spec` over the defaults of the class in `registry` it names."""
    kind = spec.get("kind")
    if not isinstance(kind, str) or kind not in registry:
        raise ValueError(f"{setting}.kind = {kind!r} is unknown{_nearest(str(kind), registry)}")
    defaults = {
        name: list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        for name, parameter in inspect.signature(registry[kind]).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for name in spec:
        if name not in (known := ["kind", "hidden", *defaults]):
            raise ValueError(
                f"{setting}.{name} is no option of kind {kind!r}{_nearest(name, known)}"
            )
    return {**defaults, **spec}


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; expected one of: {', '.join(known)}"
