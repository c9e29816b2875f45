"""Feed-forward kinds: what stands between two residual additions, from width d to d.

Every kind starts variance-preserving: inputs of mean square 1, which the norm before the
block provides, give outputs of variance output_scale². A comparison of kinds is worth
little when one of them starts badly.

Adding a kind is one subclass of `FeedForward` and one line in `FEED_FORWARDS`; its options
are the keyword-only arguments of its `__init__`, annotated and with defaults.
"""

from collections.abc import Mapping
from typing import Any

from ...kan import BASES
from .base import FeedForward
from .kan import KAN
from .mlp import GELU, ReLU2, SwiGLU
from .options import complete

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
    completed = complete("feed_forward", FEED_FORWARDS, spec)
    if "basis" in completed:
        completed["basis"] = complete("feed_forward.basis", BASES, completed["basis"])
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


__all__ = [
    "FEED_FORWARDS",
    "GELU",
    "KAN",
    "FeedForward",
    "ReLU2",
    "SwiGLU",
    "complete_feed_forward",
    "make_feed_forward",
]
