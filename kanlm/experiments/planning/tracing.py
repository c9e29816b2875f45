"""What a training step holds in memory, found by running one on tensors without numbers.

Formulas for activations go wrong with every new kind of block. So the step itself runs, on
torch's fake tensors, which have shapes, dtypes and lifetimes and no memory, while every
storage that comes to life or goes is counted. The operations are those of eager torch, with
attention by a kernel that keeps no scores; compiled code keeps as much or less.
"""

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Private names, which torch's own documentation has for such tools.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kanlm.kan.casts import cast_once
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.attention import Attention
from kanlm.model.decoder import KanLMModel
from kanlm.model.feed_forward import FeedForward
from kanlm.model.layers import Embedding, Linear, RMSNorm
from kanlm.training.compilation import recompute_blocks

#: Copies of parameters in the dtype of autocast, which the step keeps until backward.
CASTS = "casts"
GRADIENTS = "gradients"
#: Made in backward, and gone soon.
BACKWARD = "backward"
LOSS = "logits and loss"


#: Part by the kind of module whose forward pass makes it.
_NAMES: dict[type[nn.Module], str] = {
    KanLMModel: "residual stream",
    Embedding: "embedding",
    Attention: "attention",
    FeedForward: "feed-forward",
    RMSNorm: "norms",
    Linear: LOSS,
}


@dataclass(frozen=True)
class Step:
    """Bytes beside parameters and optimizer state."""

    #: What is held beside gradients of parameters, and those, at the times when it may be
    #: most of all: later ones hold less and more of these.
    profile: tuple[tuple[int, int], ...]
    #: When the step holds most beside gradients of parameters and casts.
    activations: int
    #: What those are, by the part of the model that made them: `embedding`, `attention`,
    #: `feed-forward`, `norms`, `residual stream`, `logits and loss`, and `backward`.
    activation_parts: Mapping[str, int]
    #: Largest sum of casts.
    casts: int

    def peak(self, share: float = 1.0) -> int:
        """Return all together when the step holds most.

        Args:
            share: of the gradients, that a device holds.
        """
        return max(held + round(share * gradients) for held, gradients in self.profile)


def trace_step(
    config: KanLMConfig,
    *,
    rows: int,
    micro_batches: int,
    precision: str,
    activation_checkpointing: bool,
) -> Step:
    """Run forward and backward of a step without memory.

    Args:
        config: the model's, with its `vocab_size`.
        rows: sequences of `context_length` tokens in one forward pass.
        micro_batches: passes in a step; from the second on, gradients are there already.
        precision: as `training.precision`.
    """
    with torch.device("meta"):
        model = KanLMForCausalLM(config)
    if precision == "fp64":
        model.double()
    if activation_checkpointing:
        recompute_blocks(model)
    model.train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        model.tie_weights()
        tokens = torch.zeros(rows, config.context_length, dtype=torch.long)
        counter = LiveBytes(model)
        with counter, _by_part(model, counter), cast_once():
            for _ in range(min(micro_batches, 2)):
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    loss = model(
                        input_ids=tokens, shift_labels=tokens, num_items_in_batch=tokens.numel()
                    ).loss
                with counter.during(BACKWARD):
                    loss.backward()
                del loss
    return Step(
        tuple(counter.profile), counter.activations, counter.activation_parts, counter.casts
    )


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, for as long as they live, by part.

    Args:
        model: its parameters and buffers do not count, their gradients do.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.part = LOSS
        self.now = self.activations = self.casts = 0
        self.profile: list[tuple[int, int]] = []
        self.parts: Counter[str] = Counter()
        self.activation_parts: dict[str, int] = {}
        self._alive: dict[int, tuple[str, int]] = {}
        own = [*model.parameters(), *model.buffers()]
        self._own = {tensor.untyped_storage()._cdata for tensor in own}
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self._is_gradient)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        cast = func is torch.ops.aten._to_copy.default and self._key(args[0]) in self._own
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor, CASTS if cast else self.part)
        return out

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Count what is made within the block as this part's."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def _add(self, tensor: Tensor, part: str) -> None:
        storage, key = tensor.untyped_storage(), self._key(tensor)
        if key in self._own or key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = part, size
        weakref.finalize(storage, self._drop, key)
        self.parts[part] += size
        self.now += size
        gradients = self.parts[GRADIENTS]
        held = self.now - gradients
        # Gradients only ever grow, so that this time outdoes those that held no more.
        while self.profile and self.profile[-1][0] <= held:
            self.profile.pop()
        self.profile.append((held, gradients))
        self.casts = max(self.casts, self.parts[CASTS])
        activations = held - self.parts[CASTS]
        if activations > self.activations:
            self.activations = activations
            others = {CASTS: 0, GRADIENTS: 0}
            self.activation_parts = {k: v for k, v in {**self.parts, **others}.items() if v}

    def _drop(self, key: int) -> None:
        part, size = self._alive.pop(key)
        self.parts[part] -= size
        self.now -= size

    def _is_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        key = self._key(parameter.grad)
        part, size = self._alive[key]
        if part != GRADIENTS:
            self._alive[key] = GRADIENTS, size
            self.parts[part] -= size
            self.parts[GRADIENTS] += size

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata


@contextmanager
def _by_part(model: nn.Module, counter: LiveBytes) -> Iterator[None]:
    """Make the parts of the model report when they run."""
    hooks = []
    for module, part in _parts(model):
        entered: list[Any] = []

        def enter(module: nn.Module, args: Any, part: str = part, entered: list = entered) -> None:
            # A block that is computed again is so for backward.
            in_backward = counter.part == BACKWARD
            context = nullcontext() if in_backward else counter.during(part)
            context.__enter__()
            entered.append(context)

        def leave(module: nn.Module, args: Any, out: Any, entered: list = entered) -> None:
            entered.pop().__exit__(None, None, None)

        hooks.append(module.register_forward_pre_hook(enter))
        hooks.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _parts(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Find the decoder, and the outermost modules in it that a part is named after."""
    for module in model.children():
        part = next((name for kind, name in _NAMES.items() if isinstance(module, kind)), None)
        if part is not None:
            yield module, part
        if part is None or isinstance(module, KanLMModel):
            yield from _parts(module)
