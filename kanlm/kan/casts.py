"""Weights in the narrower dtype of autocast, cast once in a step however many passes it takes.

A pass casts every weight, edge layers cast theirs again in backward, and a block that is
checkpointed all of its own: for nothing, where weights change once in a step.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: What has been cast, by the weights' memory and how often it was written to; and that memory, so
#: that nothing else has its id.
_kept: dict[tuple[object, ...], tuple[Tensor, list[torch.UntypedStorage]]] | None = None


@contextmanager
def cast_once() -> Iterator[None]:
    """Keep weights as they were cast, by edge layers and by `narrowed`, until the block is left.

    Forward and backward passes may be within, and what changes weights must not. (Autocast would
    keep its own casts in a block around several passes, but as parts of the first pass's graph,
    which later backward passes come to last of all: FSDP2 has shared gradients out by then.)
    """
    global _kept
    before, _kept = _kept, {}
    try:
        yield
    finally:
        _kept = before


def narrowed(weight: Tensor) -> Tensor:
    """A weight in the dtype of autocast within `cast_once`, else as it is, for autocast to cast."""
    device = weight.device.type
    if torch.compiler.is_compiling() or _kept is None or not torch.is_autocast_enabled(device):
        return weight
    if weight.dtype != torch.float32:
        return weight
    return _Narrow.apply(weight, torch.get_autocast_dtype(device))


class _Narrow(torch.autograd.Function):
    """A cast, made or kept, that belongs to the graph of its pass."""

    @staticmethod
    def forward(weight: Tensor, dtype: torch.dtype) -> Tensor:
        return kept(lambda: weight.to(dtype), dtype, weight).detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, torch.dtype], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.dtype), None


def kept(make: Callable[[], Tensor], dtype: torch.dtype, *weights: Tensor | None) -> Tensor:
    """What `make` casts weights to, of which nobody asks a gradient and which nobody changes.

    Args:
        dtype: of the result.
        weights: all that it is made of.
    """
    given = [weight.detach() for weight in weights if weight is not None]
    # There is nothing to gain where nothing is narrowed, and a copy to lose.
    if _kept is None or all(weight.dtype == dtype for weight in given):
        return make()
    # `_version` is private, and all that says whether a tensor was written to.
    key = (dtype, *((id(w.untyped_storage()), w._version, *_layout(w)) for w in given))
    if key not in _kept:
        _kept[key] = make(), [w.untyped_storage() for w in given]
    return _kept[key][0]


def _layout(x: Tensor) -> tuple[object, ...]:
    return x.storage_offset(), tuple(x.shape), x.stride()
