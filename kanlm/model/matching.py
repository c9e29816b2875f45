"""Twins: the inner width at which one feed-forward kind costs what another does.

Costs are read off modules built on the meta device, so that no formula is stated twice.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from .feed_forward import FeedForward, complete_feed_forward, make_feed_forward
from .settings import ModelSettings

#: Parameters of a feed-forward block whose width is left open, in units of d_model²:
#: those of the classic MLP with hidden = 4 d_model.
DEFAULT_PARAMETERS = 8


def feed_forward_cost(
    spec: Mapping[str, Any], d_model: int, of: Literal["parameters", "flops"]
) -> int:
    """Parameters, or forward FLOPs a token, of the block that `spec` describes."""
    with torch.device("meta"):
        block: FeedForward = make_feed_forward(spec, d_model, output_scale=1.0)
    if of == "flops":
        return block.flops_per_token
    return sum(parameter.numel() for parameter in block.parameters())


def solve_hidden(
    feed_forward: Mapping[str, Any],
    d_model: int,
    *,
    parameters: int | None = None,
    flops: int | None = None,
) -> int:
    """Find the hidden width at which a block comes nearest to a cost.

    Arguments:
        feed_forward: kind and options; its `hidden`, if any, is not looked at.
        d_model: width of the residual stream.
        parameters, flops: the cost, exactly one of them.

    Returns: the width; the block's cost is within 1% or one unit of width of the target,
    whichever is larger.

    Raises:
        ValueError: even hidden = 1 costs more, or the kind is unknown.
    """
    if (parameters is None) == (flops is None):
        raise ValueError("solve_hidden needs either parameters or flops")
    of: Literal["parameters", "flops"] = "flops" if parameters is None else "parameters"
    target = flops if parameters is None else parameters
    assert target is not None

    def cost(hidden: int) -> int:
        return feed_forward_cost({**feed_forward, "hidden": hidden}, d_model, of)

    narrowest = cost(1)
    if narrowest - target > max(target / 100, (cost(2) - narrowest) / 2):
        raise ValueError(
            f"feed_forward of kind {feed_forward.get('kind')!r} cannot be as small as "
            f"{target:,} {of} at d_model = {d_model}: hidden = 1 has {narrowest:,}"
        )
    low, high = 1, 2
    while cost(high) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= target else (low, middle)
    return min((low, high), key=lambda hidden: abs(cost(hidden) - target))


def resolve_feed_forward(settings: ModelSettings) -> ModelSettings:
    """State every option, and solve the widths left open for 8 d_model² parameters.

    Raises:
        ValueError: a kind or an option is unknown, or no width matches.
    """
    target = DEFAULT_PARAMETERS * settings.d_model**2

    def resolve(spec: dict[str, Any]) -> dict[str, Any]:
        spec = complete_feed_forward(spec)
        if spec.get("hidden") is not None:
            return spec
        return {**spec, "hidden": solve_hidden(spec, settings.d_model, parameters=target)}

    if isinstance(settings.feed_forward, list):
        resolved: Any = [resolve(spec) for spec in settings.feed_forward]
    else:
        resolved = resolve(settings.feed_forward)
    return dataclasses.replace(settings, feed_forward=resolved)


def twin(
    settings: ModelSettings,
    feed_forward: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    match: Literal["parameters", "flops"] = "parameters",
) -> ModelSettings:
    """Give `settings` other kinds, as costly in total as its own.

    Each layer gets an equal share, so that the sum over layers matches to 1% or one unit
    of width a layer. Widths are solved, whatever `feed_forward` says of them.

    Arguments:
        feed_forward: one kind with its options for all layers, or one a layer.

    Raises:
        ValueError: no width matches.
    """
    layers = resolve_feed_forward(settings).feed_forward_by_layer
    total = sum(feed_forward_cost(spec, settings.d_model, match) for spec in layers)
    share = {match: round(total / settings.n_layers)}

    def solved(spec: Mapping[str, Any]) -> dict[str, Any]:
        return {**spec, "hidden": solve_hidden(spec, settings.d_model, **share)}

    several = not isinstance(feed_forward, Mapping)
    kinds: Any = [solved(spec) for spec in feed_forward] if several else solved(feed_forward)
    return dataclasses.replace(settings, feed_forward=kinds)
