"""Feed-forward kinds: what stands between two residual additions, from width d to d.

Every kind starts variance-preserving: inputs of mean square 1, which the norm before the
block provides, give outputs of variance output_scale². A comparison of kinds is worth
little when one of them starts badly.

Adding a kind is one subclass of `FeedForward` and one line in `FEED_FORWARDS`; its options
are the keyword-only arguments of its `__init__`, annotated and with defaults. An option
named `basis` holds a basis's options, and `experts` and `block` hold those of blocks within
the block: these are completed and checked too.
"""

import math
from collections.abc import Mapping
from typing import Any

from ...kan import BASES
from .base import Context, FeedForward
from .convolution import ConvKAN
from .kan import KAN, KANGLU, KANLocal, KANSingle
from .mlp import GELU, ReLU2, SwiGLU
from .moe import MoE
from .options import NESTED, Check, complete, map_nested, over_default_basis
from .shared import KAT, LowRankKAN, SplineMLP

#: Feed-forward kinds by the `kind` of their settings.
FEED_FORWARDS: dict[str, type[FeedForward]] = {
    "gelu": GELU,
    "relu2": ReLU2,
    "swiglu": SwiGLU,
    "kan": KAN,
    "kan-local": KANLocal,
    "kan-glu": KANGLU,
    "kan-single": KANSingle,
    "spline-mlp": SplineMLP,
    "kat": KAT,
    "lowrank-kan": LowRankKAN,
    "moe": MoE,
    "conv-kan": ConvKAN,
}


def complete_feed_forward(
    spec: Mapping[str, Any], setting: str = "feed_forward", check: Check | None = None
) -> dict[str, Any]:
    """State every option of `{"kind": …, "hidden": …, **options}`, defaults included.

    A saved model then means the same when a default has changed. A kind without a width is
    left without `hidden`.

    Args:
        setting: where the spec stands, for errors.
        check: what to check of each spec, those of bases and inner blocks included, before it
            is completed.

    Raises:
        ValueError: the kind, an option, or the basis is unknown, or a width is stated
            where there is none to state.
    """
    completed = complete(setting, FEED_FORWARDS, spec, beside=("hidden",), check=check)
    kind, hidden = completed["kind"], completed.get("hidden")
    factory = FEED_FORWARDS[kind]
    if hidden is not None and (isinstance(hidden, bool) or not isinstance(hidden, int)):
        raise ValueError(f"{setting}.hidden = {hidden!r}: expected a whole number or null")
    if not factory.has_width:
        completed.pop("hidden", None)
        if hidden is not None:
            raise ValueError(f"{setting}.hidden = {hidden}: kind {kind!r} has no width to set")
    if "basis" in completed:
        basis = over_default_basis(factory, completed["basis"])
        completed["basis"] = complete(f"{setting}.basis", BASES, basis, check=check)
        if completed.get("base") == "auto":
            completed["base"] = BASES[completed["basis"]["kind"]].default_base

    def complete_inner(spec: Any, setting: str) -> dict[str, Any]:
        inner = complete_feed_forward(spec, setting, check)
        if not FEED_FORWARDS[inner["kind"]].has_width:
            raise ValueError(
                f"{setting}.kind = {inner['kind']!r} has no width, and the block around it sets one"
            )
        if "hidden" in inner:
            raise ValueError(
                f"{setting}.hidden = {inner['hidden']}: the width is that of the block around it"
            )
        return inner

    return map_nested(completed, setting, complete_inner)


def width_multiple(spec: Mapping[str, Any]) -> int:
    """The number that `hidden` must be a multiple of in the block that `spec` describes.

    Raises:
        ValueError: the kind or an option is unknown.
    """
    completed = complete_feed_forward(spec)
    inner = [completed[name] for name in NESTED if name in completed]
    blocks = [block for part in inner for block in (part if isinstance(part, list) else [part])]
    own = FEED_FORWARDS[completed["kind"]].width_multiple(completed)
    return math.lcm(own, *(width_multiple(block) for block in blocks))


def make_feed_forward(spec: Mapping[str, Any], d_model: int, output_scale: float) -> FeedForward:
    """Build the block that `{"kind": …, "hidden": …, **options}` describes.

    Raises:
        ValueError: the kind or an option is unknown, or `hidden` is missing.
    """
    options = complete_feed_forward(spec)
    factory = FEED_FORWARDS[kind := options.pop("kind")]
    hidden = options.pop("hidden", None) if factory.has_width else d_model
    if hidden is None:
        raise ValueError(f"feed_forward of kind {kind!r} states no hidden width")
    return factory(d_model, hidden, output_scale, **options)


__all__ = [
    "FEED_FORWARDS",
    "GELU",
    "KAN",
    "KANGLU",
    "KAT",
    "NESTED",
    "Check",
    "Context",
    "ConvKAN",
    "FeedForward",
    "KANLocal",
    "KANSingle",
    "LowRankKAN",
    "MoE",
    "ReLU2",
    "SplineMLP",
    "SwiGLU",
    "complete_feed_forward",
    "make_feed_forward",
    "map_nested",
    "width_multiple",
]
