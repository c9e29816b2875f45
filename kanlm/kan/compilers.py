"""Compilers that others look for, so that what they lack is told before they fail."""

import os
import shutil


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
