"""Decoding: modules prepared once for one token after another.

Between two tokens weights have displaced all else in the caches, and asking every module for
everything takes as long as reading many of them. So what few_tokens.cpp is told of a module is
made once, when decoding begins.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .kernels.choice import chosen_backend
from .kernels.few_tokens import Edges, Prepared
from .tracing import observed


@runtime_checkable
class Decodable(Protocol):
    """A module that computes layers in a row, and asks `decoded` before it computes."""

    def decoding_layers(self) -> Sequence[Edges] | None:
        """What it computes, or None where that is not all, or other modules have to be called."""
        ...


_prepared: ContextVar[Mapping[nn.Module, Prepared]] = ContextVar("prepared")


@contextmanager
def decoding(model: nn.Module) -> Iterator[None]:
    """Have a model's KAN layers and blocks decode fast within the block, in this thread.

        with torch.no_grad(), decoding(model):
            for _ in range(100):
                tokens = step(model, tokens)

    `generate` of our models opens it by itself. On entry, each `KANLinear` and each block of such
    layers is prepared for up to 64 tokens at a time, in float32 or bfloat16 on a CPU: a block then
    is one call, in which norms and inner layers are not called by themselves. More tokens, other
    inputs, and whatever asks for gradients or is compiled go the ordinary way, with the same
    results to rounding.

    Not prepared is what may be more than its weights say on entry: modules with hooks (also of
    accelerate's, which fetch weights), adapters in the place of a layer, subclasses, parametrised,
    quantised and sharded weights, and weights that are elsewhere than on the CPU.

    **Weights must not change within the block.** Those that do in place may be read half old and
    half new, and those that are replaced, or moved or cast by `model.to`, go on as they were until
    the block ends; no other memory is read. Between two blocks they may change in any way.
    Hooks that are registered within the block, and torch's hooks on all modules, see the outermost
    prepared module alone.

    Blocks may be nested, of one model or several: each prepares anew, and what the outer one
    prepared holds again when the inner one ends.
    """
    prepared = dict(_prepared.get({}))
    for module in model.modules():
        prepared.pop(module, None)
        if isinstance(module, Decodable) and (made := _prepare(module)) is not None:
            prepared[module] = made
    token = _prepared.set(prepared)
    try:
        yield
    finally:
        _prepared.reset(token)


def decoded(module: nn.Module, x: Tensor) -> Tensor | None:
    """What a module that is prepared computes of x; None where it has to itself."""
    if torch.compiler.is_compiling():
        return None
    prepared = _prepared.get({}).get(module)
    if prepared is None or torch.is_grad_enabled() or not prepared.can(x):
        return None
    if chosen_backend() != "auto" or observed(x) is not None:
        return None
    return prepared(x)


def is_called_alone(module: nn.Module) -> bool:
    """Whether nothing but the module itself waits for it to be called."""
    # Accelerate puts another `forward` in place of that of weights that lie elsewhere.
    hooks = module._forward_pre_hooks or module._forward_hooks
    return not hooks and "forward" not in module.__dict__


def _prepare(module: Decodable) -> Prepared | None:
    layers = module.decoding_layers()
    if layers is None:
        return None
    width = layers[0].coefficients.shape[0]
    for layer in layers:
        # A tensor in an attribute may be another at every call, as FSDP's views are.
        if not all(t is None or isinstance(t, nn.Parameter) for t in layer.tensors):
            return None
        layer.check(width)
        width = layer.coefficients.shape[2]
    return Prepared.of(layers, layers[0].coefficients.dtype)
