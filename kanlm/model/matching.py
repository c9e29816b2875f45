"""Twins: the inner width at which one feed-forward kind costs what another does.

Costs are read off modules built on the meta device, so that no formula is stated twice.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from .feed_forward import (
    FEED_FORWARDS,
    FeedForward,
    complete_feed_forward,
    make_feed_forward,
    width_multiple,
)
from .settings import ModelSettings

#: Parameters of a feed-forward block whose width is left open, in units of d_model²:
#: those of the classic MLP with hidden = 4 d_model.
DEFAULT_PARAMETERS = 8

#: Widths are rounded to a multiple of the first of these that keeps the cost to
#: ALIGNMENT_TOLERANCE. On a CPU the matrix products of 4,096 tokens, d_model 512 and a
#: hidden width of 683 took 20% longer than with 680, and tensor cores want multiples of 8.
ALIGNMENTS = (64, 32, 16, 8, 4, 2)
ALIGNMENT_TOLERANCE = 0.005

#: What twins have in common.
Cost = Literal["parameters", "flops"]


def feed_forward_cost(spec: Mapping[str, Any], d_model: int, of: Cost) -> int:
    """Parameters, or forward FLOPs a token, of the block that `spec` describes."""
    with torch.device("meta"):
        block: FeedForward = make_feed_forward(spec, d_model, output_scale=1.0)
    if of == "flops":
        return block.flops_per_token
    return sum(parameter.numel() for parameter in block.parameters())


def total_cost(settings: ModelSettings, of: Cost) -> int:
    """Parameters, or forward FLOPs a token, of all feed-forward blocks together."""
    layers = resolve_feed_forward(settings).feed_forward_by_layer
    return sum(feed_forward_cost(spec, settings.d_model, of) for spec in layers)


def has_width(spec: Mapping[str, Any]) -> bool:
    """Whether the block that `spec` describes has a width to solve.

    Raises:
        ValueError: the kind or an option is unknown.
    """
    return FEED_FORWARDS[complete_feed_forward(spec)["kind"]].has_width


def solve_hidden(
    feed_forward: Mapping[str, Any],
    d_model: int,
    *,
    parameters: int | None = None,
    flops: int | None = None,
) -> int:
    """Find the hidden width at which a block comes nearest to a cost.

    Args:
        feed_forward: kind and options; its `hidden`, if any, is not looked at.
        d_model: width of the residual stream.
        parameters, flops: the cost, exactly one of them.

    Returns: the width; the block's cost is within 1% or one unit of width of the target,
    whichever is larger. The unit is the number that the kind's width must be a multiple of.
    Among the widths within ALIGNMENT_TOLERANCE the one that hardware likes best is taken.

    Raises:
        ValueError: the kind has no width or is unknown, or even the narrowest block costs
            more.
    """
    if (parameters is None) == (flops is None):
        raise ValueError("solve_hidden needs either parameters or flops")
    of: Cost = "flops" if parameters is None else "parameters"
    target = flops if parameters is None else parameters
    assert target is not None
    spec = {name: value for name, value in feed_forward.items() if name != "hidden"}
    if not has_width(spec):
        raise ValueError(f"feed_forward of kind {spec['kind']!r} has no width to solve")
    unit = width_multiple(spec)

    def cost(units: int) -> int:
        return feed_forward_cost({**spec, "hidden": units * unit}, d_model, of)

    narrowest = cost(1)
    slope = cost(2) - narrowest
    if narrowest - target > max(target / 100, slope / 2):
        raise ValueError(
            f"feed_forward of kind {spec['kind']!r} cannot be as small as "
            f"{target:,} {of} at d_model = {d_model}: hidden = {unit} has {narrowest:,}"
        )
    # Nearly every kind's cost is affine in its width, so that this is mostly the answer.
    low = max(1, 1 + (target - narrowest) // slope)
    high = low + 1
    if cost(low) > target:
        low = 1
    while cost(high) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= target else (low, middle)
    nearest = min((low, high), key=lambda units: abs(cost(units) - target))
    for alignment in ALIGNMENTS:
        step = math.lcm(unit, alignment) // unit
        aligned = max(1, round(nearest / step)) * step
        if abs(cost(aligned) - target) <= ALIGNMENT_TOLERANCE * target:
            return unit * aligned
    return unit * nearest


def resolve_feed_forward(settings: ModelSettings) -> ModelSettings:
    """State every option, and solve the widths left open for 8 d_model² parameters.

    Raises:
        ValueError: a kind or an option is unknown, or no width matches.
    """
    target = DEFAULT_PARAMETERS * settings.d_model**2
    solved: dict[str, dict[str, Any]] = {}

    def resolve(spec: dict[str, Any]) -> dict[str, Any]:
        # Of a thousand equal layers one is solved.
        key = json.dumps(spec, sort_keys=True)
        if key not in solved:
            solved[key] = resolve_one(spec)
        return dict(solved[key])

    def resolve_one(spec: dict[str, Any]) -> dict[str, Any]:
        spec = complete_feed_forward(spec)
        if spec.get("hidden") is not None or not has_width(spec):
            return spec
        return {**spec, "hidden": solve_hidden(spec, settings.d_model, parameters=target)}

    if isinstance(settings.feed_forward, list):
        resolved: Any = [resolve(spec) for spec in settings.feed_forward]
    else:
        resolved = resolve(settings.feed_forward)
    return dataclasses.replace(settings, feed_forward=resolved)


def solve_widths(settings: ModelSettings, total: int, of: Cost) -> ModelSettings:
    """Solve the feed-forward widths of `settings` so that all blocks together cost `total`.

    Blocks without a width cost what they cost, and the others get equal shares of the rest,
    so that the sum matches to 1% or one unit of width a layer. Stated widths are not
    looked at.

    Raises:
        ValueError: no block has a width, or no width matches.
    """
    layers = settings.feed_forward_by_layer
    fixed = [spec for spec in layers if not has_width(spec)]
    if len(fixed) == len(layers):
        raise ValueError(f"feed_forward of kind {layers[0]['kind']!r} has no width to solve")
    rest = total - sum(feed_forward_cost(spec, settings.d_model, of) for spec in fixed)
    share = {of: round(rest / (len(layers) - len(fixed)))}

    def solved(spec: dict[str, Any]) -> dict[str, Any]:
        if not has_width(spec):
            return spec
        return {**spec, "hidden": solve_hidden(spec, settings.d_model, **share)}

    several = isinstance(settings.feed_forward, list)
    kinds: Any = [solved(spec) for spec in layers] if several else solved(layers[0])
    return dataclasses.replace(settings, feed_forward=kinds)


def twin(
    settings: ModelSettings,
    feed_forward: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    match: Cost = "parameters",
) -> ModelSettings:
    """Give `settings` other kinds, as costly in total as its own.

    Args:
        feed_forward: one kind with its options for all layers, or a list as in
            `ModelSettings`. Its widths are solved, whatever it says of them.

    Raises:
        ValueError: no block has a width, or no width matches.
    """
    several = not isinstance(feed_forward, Mapping)
    kinds: Any = [dict(spec) for spec in feed_forward] if several else dict(feed_forward)
    other = dataclasses.replace(settings, feed_forward=kinds)
    return solve_widths(other, total_cost(settings, match), match)
