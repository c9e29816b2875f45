"""Layers and blocks as few_tokens.cpp is told of them, kept from one token to the next.

Between two tokens weights have displaced all else in the caches, and asking a layer for everything
takes as long as reading many of its weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from ..plain_tensors import is_plain
from .few_tokens import (
    MOST_TOKENS,
    CppLayer,
    Edges,
    Evaluated,
    call_cpp,
    describe,
    readable_by_cpp,
)

_prepared: ContextVar[Mapping[nn.Module, "Prepared"] | None] = ContextVar("prepared", default=None)
#: How many blocks of `use_prepared` are open in all threads, and whether any is: for code that
#: torch.compile traces, which cannot ask a ContextVar, and is traced again where this changes.
_open_blocks = 0
_any_open = False


class Prepared:
    """Layers in a row as few_tokens.cpp takes them: it is told where their tensors lie, and finds
    all functions' values by itself.

    The tensors that it was made of are kept, and what they hold then is read at every call.
    """

    def __init__(self, layers: Sequence[Edges], evaluated: Sequence[Evaluated]) -> None:
        self.dtype = layers[0].coefficients.dtype
        self.inputs = layers[0].coefficients.shape[0]
        described = [describe(*pair) for pair in zip(layers, evaluated, strict=True)]
        self._layers = (CppLayer * len(layers))(*described)
        # Also the memory itself: `data` of a parameter may be put in another's place.
        weights = [weight for layer in layers for weight in layer.weights]
        read = [*weights, *(t for each in evaluated for t in (each.knots, each.learned))]
        self._kept = described, [None if t is None else t.untyped_storage() for t in read]

    @classmethod
    def of(cls, layers: Sequence[Edges]) -> "Prepared | None":
        """None where few_tokens.cpp does not know a basis, or cannot read the weights.

        Raises:
            ValueError: weights do not fit each other.
        """
        width, dtype = layers[0].coefficients.shape[0], layers[0].coefficients.dtype
        found = []
        for layer in layers:
            # A tensor in an attribute may be another at every call, as FSDP's views are.
            if not all(t is None or isinstance(t, nn.Parameter) for t in layer.weights):
                return None
            layer.check(width)
            width = layer.coefficients.shape[2]
            evaluated = Evaluated.of(layer.basis)
            if evaluated is None or not readable_by_cpp(layer, dtype):
                return None
            found.append(evaluated)
        return cls(layers, found)

    def can(self, x: Tensor) -> bool:
        """Whether inputs are of the type and width, plain ones on a CPU, and few."""
        return (
            x.dtype == self.dtype
            and x.device.type == "cpu"
            and x.shape[-1] == self.inputs
            and 0 < x.numel() <= MOST_TOKENS * self.inputs
            and is_plain(x)
        )

    def __call__(self, x: Tensor) -> Tensor:
        return call_cpp(self._layers, x)


@contextmanager
def use_prepared(modules: Mapping[nn.Module, Prepared]) -> Iterator[None]:
    """Decode within the block, in this thread, with these modules prepared."""
    token = _prepared.set(modules)
    _count(1)
    try:
        yield
    finally:
        _count(-1)
        _prepared.reset(token)


def prepared_modules() -> Mapping[nn.Module, Prepared]:
    """Those of this thread."""
    return _prepared.get() or {}


def is_decoding() -> bool:
    """Whether a block of `use_prepared` is open in this thread; in compiled code, in any."""
    return _any_open if torch.compiler.is_compiling() else _prepared.get() is not None


def _count(change: int) -> None:
    global _open_blocks, _any_open
    _open_blocks += change
    _any_open = _open_blocks > 0
