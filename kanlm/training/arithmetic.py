"""How the device computes: products of float32 by TF32 or exactly, and the same every time.

On a CPU the same start gives the same bits. On a GPU that costs speed and must be asked for:
torch chooses tiles by timing them, and adds up in the order in which threads come (backward of
attention and embedding).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kanlm.config import TrainingSettings

#: The variable that makes cuBLAS add up in one order; it must be set before cuBLAS starts.
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def tf32_is_on() -> bool:
    """Whether this process multiplies float32 as TF32 on a GPU, by either way of asking torch."""
    # torch.get_float32_matmul_precision() raises where the other way was taken.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@contextmanager
def arithmetic(training: TrainingSettings, device: torch.device) -> Iterator[str | None]:
    """Compute as the settings say within the block; what that means on this device, in words.

    None where there is nothing to say: on a CPU that was asked for nothing.
    """
    with _deterministic(training.deterministic), _tf32(bool(training.tf32), device):
        yield _in_words(training, device)


def _in_words(training: TrainingSettings, device: torch.device) -> str | None:
    if device.type == "cpu":
        return "training.tf32 changes nothing on a CPU" if training.tf32 else None
    words = []
    if training.precision == "fp32":
        words.append(
            "float32 multiplied as TF32"
            if training.tf32
            else "float32 multiplied exactly (training.tf32=true is several times faster)"
        )
    words.append(
        "deterministic operators: equal to the last bit on GPUs of one kind, with as many "
        "processes and the same versions"
        if training.deterministic
        else "a run that is resumed or repeated is equal to rounding, not to the last bit "
        "(training.deterministic=true)"
    )
    return "; ".join(words)


@contextmanager
def _tf32(wanted: bool, device: torch.device) -> Iterator[None]:
    """Set products and convolutions, of which torch takes TF32 for the latter by itself."""
    if device.type != "cuda":
        yield
        return
    backends: Any = torch.backends
    products, convolutions = backends.cuda.matmul, backends.cudnn.conv
    before = products.fp32_precision, convolutions.fp32_precision
    # Asked for so, all of torch's readers understand it.
    torch.set_float32_matmul_precision("high" if wanted else "highest")
    convolutions.fp32_precision = "tf32" if wanted else "ieee"
    try:
        yield
    finally:
        products.fp32_precision, convolutions.fp32_precision = before


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Use operators that give the same bits every time, and raise for those that cannot."""
    if not wanted:
        yield
        return
    # Private, but the documented place of Inductor's options.
    import torch._inductor.config as inductor

    compiling: Any = inductor
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        compiling.deterministic,
    )
    os.environ.setdefault(_WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    compiling.deterministic = True
    try:
        yield
    finally:
        enabled, warns, torch.backends.cudnn.benchmark, compiling.deterministic = before
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
