"""Weights in the narrower dtype of autocast, cast once in a step however many passes it takes.

A pass casts every weight, edge layers cast theirs again in backward, and a block that is
checkpointed all of its own: for nothing, where weights change once in a step.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

#: What has been cast, by where the weights lie and how often they were written to; and the
#: weights, so that nothing else comes to lie there.
_kept: dict[tuple[object, ...], tuple[Tensor, list[Tensor]]] | None = None


@contextmanager
def cast_once(device_type: str) -> Iterator[None]:
    """Keep weights as they were cast, by autocast and by edge layers, until the block is left.

    Forward and backward passes may be within, and what changes weights must not.
    """
    global _kept
    before, _kept = _kept, {}
    try:
        # Autocast keeps its casts until the outermost block is left. This one casts nothing, so
        # that backward multiplies in the dtypes of forward.
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        _kept = before


def kept(make: Callable[[], Tensor], dtype: torch.dtype, *weights: Tensor | None) -> Tensor:
    """What `make` casts weights to, of which nobody asks a gradient and which nobody changes.

    Arguments:
        dtype: of the result.
        weights: all that it is made of.
    """
    given = [weight.detach() for weight in weights if weight is not None]
    # There is nothing to gain where nothing is narrowed, and a copy to lose.
    if _kept is None or all(weight.dtype == dtype for weight in given):
        return make()
    key = (dtype, *((w.untyped_storage()._cdata, w._version, *_layout(w)) for w in given))
    if key not in _kept:
        _kept[key] = make(), given
    return _kept[key][0]


def _layout(x: Tensor) -> tuple[object, ...]:
    return x.storage_offset(), tuple(x.shape), x.stride()
