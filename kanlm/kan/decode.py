"""Decoding: layers and blocks that are prepared once for one token after another."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from torch import nn

from .kernels import Edges
from .kernels.prepared import Prepared, prepared_modules, use_prepared


@runtime_checkable
class Decodable(Protocol):
    """A module that computes layers in a row, and asks `prepared_sums` before it computes."""

    def decoding_layers(self) -> Sequence[Edges] | None:
        """What it computes, or None where that is not all, or other modules have to be called."""
        ...


@contextmanager
def decoding(model: nn.Module) -> Iterator[None]:
    """Have a model's KAN layers decode fast within the block, in this thread.

        with torch.no_grad(), decoding(model):
            for _ in range(100):
                tokens = step(model, tokens)

    `generate` of our models opens it by itself. Within it a `KANLinear` that is given up to 64
    tokens, and is asked for no gradients, reads only the coefficients that play a part, from
    where they lie. Results are the same to rounding. Everything else is computed as ever: more
    tokens, gradients, autocast, and a backend that `use_backend` asks for.

    On entry layers of float32 or bfloat16 on a CPU, and blocks of such layers, are prepared: what
    C++ has to know of them is found once, and a block is one call, in which its norm and inner
    layers are not called as modules. That is left out where somebody would notice: of inner
    modules with forward hooks (from the first that is registered on), adapters, subclasses that
    compute otherwise, and replaced `forward`s. Nor are weights prepared that are computed at every
    look, as parametrised and sharded ones.

    Code that torch.compile traces within the block reads as little, layer by layer.

    **Weights must not change within the block.** Those that do in place may be read half old and
    half new, and those that are replaced, or moved or cast by `model.to`, stay as they were until
    the block ends; no other memory is read. Between two blocks they may change in any way.
    Hooks that are registered within the block, and torch's hooks on all modules, see the outermost
    prepared module alone.

    Blocks may be nested, of one model or several: each prepares anew, and what the outer one
    prepared holds again when the inner one ends.

    Raises:
        ValueError: weights of a layer do not fit each other.
    """
    prepared = dict(prepared_modules())
    for module in model.modules():
        prepared.pop(module, None)
        if isinstance(module, Decodable) and (made := _prepare(module)) is not None:
            prepared[module] = made
    with use_prepared(prepared):
        yield


def _prepare(module: Decodable) -> Prepared | None:
    layers = module.decoding_layers()
    return None if layers is None else Prepared.of(layers)
