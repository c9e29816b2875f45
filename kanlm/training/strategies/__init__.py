"""What fine-tuning does about forgetting: one class a strategy, on the callbacks of the loop.

To add one, write a `Strategy` class in a module beside these and a line in `STRATEGIES`; its
options are its keyword-only arguments. They are a part of the training room: they know the
callbacks and what a `Trainer` offers, and the loop knows none of them by name.
"""

from collections.abc import Mapping
from typing import Any

from kanlm.config import check_options
from kanlm.errors import UserError, nearest
from kanlm.training.strategies.anchors import EWC, L2SP
from kanlm.training.strategies.base import Anchored, Prepared, Strategy
from kanlm.training.strategies.distillation import Distillation
from kanlm.training.strategies.function_penalties import (
    Banded,
    InputCovariance,
    OccupancyPenalty,
)
from kanlm.training.strategies.interpolation import Interpolation
from kanlm.training.strategies.masks import OccupancyMask, OccupancyScaling, TfIdf
from kanlm.training.strategies.old_text import OldText, open_earlier
from kanlm.training.strategies.parts import AttentionOnly, FeedForwardOnly, Frozen, Plain
from kanlm.training.strategies.rows import ContinueOnBase, Joint, Replay

#: Strategies by the `kind` of their settings.
STRATEGIES: dict[str, type[Strategy]] = {
    "plain": Plain,
    "replay": Replay,
    "l2sp": L2SP,
    "ewc": EWC,
    "distillation": Distillation,
    "feed-forward-only": FeedForwardOnly,
    "attention-only": AttentionOnly,
    "interpolation": Interpolation,
    "occupancy-mask": OccupancyMask,
    "occupancy-scaling": OccupancyScaling,
    "tf-idf": TfIdf,
    "occupancy-penalty": OccupancyPenalty,
    "banded": Banded,
    "input-covariance": InputCovariance,
    "joint": Joint,
    "continue-on-base": ContinueOnBase,
    "frozen": Frozen,
}


def complete_strategy(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the spec `{kind, …options}` with every default filled in.

    Raises:
        UserError: the kind or an option is unknown, or an option has a wrong type or value.
    """
    kind = spec.get("kind")
    if kind is None:
        known = ", ".join(STRATEGIES)
        raise UserError(f"setting 'strategy.kind' is missing; expected one of: {known}")
    if not isinstance(kind, str) or kind not in STRATEGIES:
        raise UserError(f"strategy.kind = {kind!r} is unknown{nearest(str(kind), STRATEGIES)}")
    options = {name: value for name, value in spec.items() if name != "kind"}
    return {"kind": kind, **check_options(STRATEGIES[kind], options, "strategy", ("kind",))}


def make_strategy(spec: Mapping[str, Any]) -> Strategy:
    """Build the strategy that a completed spec describes."""
    options = dict(spec)
    return STRATEGIES[options.pop("kind")](**options)


__all__ = [
    "STRATEGIES",
    "Anchored",
    "OldText",
    "Prepared",
    "Strategy",
    "complete_strategy",
    "make_strategy",
    "open_earlier",
]
