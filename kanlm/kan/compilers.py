"""Compilers that others look for, so that what they lack is told before they fail."""

import importlib.util
import os
import shutil

import torch


def has_triton() -> bool:
    """Whether torch.compile can make kernels for the GPU here, by an installed Triton."""
    if importlib.util.find_spec("triton") is None:
        return False
    if torch.cuda.is_available():
        return torch.version.hip is not None or torch.cuda.get_device_capability() >= (7, 0)
    return torch.xpu.is_available()


def no_c_compiler() -> str | None:
    """Why Triton cannot launch a kernel for want of a C compiler, or None.

    It compiles what launches a kernel by what CC names, else by gcc or clang.
    """
    named = os.environ.get("CC")
    if named is not None:
        return None if shutil.which(named) else f"needs a C compiler, and CC = {named} is none"
    if shutil.which("gcc") or shutil.which("clang"):
        return None
    return "needs a C compiler, and there is none: gcc, clang, or what CC names"
