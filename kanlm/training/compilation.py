"""How the model is executed: compiled or eagerly, and what of it is kept for backward.

Inductor keeps what it compiled in TORCHINDUCTOR_CACHE_DIR (torch's default: a folder of the
user's in the temporary one), so that the next run of the same shapes only traces its graphs.
"""

import os
import shutil
from functools import partial

import torch
from accelerate import Accelerator
from torch import nn

# Private: nothing public says how long compiling took.
from torch._dynamo.utils import calculate_time_spent
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from kanlm.errors import UserError
from kanlm.kan.compilers import has_triton, no_c_compiler
from kanlm.model.decoder import KanLMDecoderLayer


def compile_model(
    model: nn.Module, choice: str, accelerator: Accelerator, *, by_block: bool = False
) -> str:
    """Compile the model in place where `choice` says so; return what was done, in words.

    `auto` compiles on a GPU that can, and elsewhere runs eagerly: on a CPU compiling takes
    longer than a short run gains. `regional` compiles each decoder block by itself: blocks of
    one kind share the code, so that its time does not grow with depth.

    Args:
        by_block: compile `on` and `auto` regionally, too, as FSDP2 needs, which hands a block
            its parameters between one and the next.

    Raises:
        UserError: `on` or `regional`, and there is no compiler to do it with.
    """
    if choice == "off":
        return "eager, as asked"
    obstacle = _obstacle(accelerator.device)
    if choice in ("on", "regional") and obstacle:
        raise UserError(f"training.compile = {choice}: {obstacle}; install it, or set it to off")
    if choice == "auto" and (obstacle or accelerator.device.type == "cpu"):
        return f"eager ({obstacle or 'auto does not compile on a CPU'})"
    if by_block or choice == "regional":
        for block in model.modules():
            if isinstance(block, KanLMDecoderLayer):
                block.compile()
        return "compiled block by block"
    model.compile()
    return "compiled"


def is_compiled(choice: str, device: torch.device) -> bool:
    """Whether `compile_model` compiles for such a choice."""
    if choice == "auto":
        return device.type != "cpu" and _obstacle(device) is None
    return choice != "off"


def compile_seconds() -> float:
    """Seconds that this process has spent compiling so far, tracing and cache hits included."""
    return calculate_time_spent()["total_wall_time"]


def recompute_blocks(model: PreTrainedModel) -> None:
    """Checkpoint the activations of every decoder block while the model trains.

    Memory for time (Chen et al., arXiv 1604.06174): a block keeps its inputs alone and computes
    the rest again in backward, exactly, its random numbers drawn as before. That costs another
    forward pass of the blocks, a third of a step's operations.
    """
    # Without the hook on the embedding that transformers' public method adds for adapters.
    model._set_gradient_checkpointing(
        enable=True, gradient_checkpointing_func=partial(checkpoint, use_reentrant=False)
    )


def _obstacle(device: torch.device) -> str | None:
    """What is missing for torch.compile on this device, or None."""
    if device.type == "cpu":
        compilers = [os.environ.get("CXX", ""), "g++", "clang++"]
        if not any(name and shutil.which(name) for name in compilers):
            return "compiling for a CPU needs a C++ compiler, and there is none"
        return None
    if not has_triton():
        return "compiling for a GPU needs triton, and there is none"
    missing = no_c_compiler()
    return missing and f"compiling for a GPU {missing}"
