"""C++ beside this file, compiled when it is first asked for.

Torch's own operators are enough to compute everything here, so a missing or broken compiler costs
speed and nothing else: the first file that cannot be compiled and loaded ends in a warning. The
library is kept in the user's cache folder, under a name made of the source, the compiler and the
processor.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

#: No `-ffast-math`: it would have every program that loads the library flush small numbers.
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++17", "-shared", "-fPIC")

_NO_COMPILER = "there is no C++ compiler: g++, or what CXX names"
_warned = False

#: Seconds that a compiler may take.
_LONGEST = 300

#: What sources may include.
_HEADERS = sorted(Path(__file__).parent.rglob("*.h"))


@functools.cache
def load_library(source: Path, *functions: str) -> ctypes.CDLL | None:
    """Compile a C++ file and load it; None, and in a process one warning, where that fails.

    Nothing is tried, and nothing said, on other systems than Linux and where KANLM_NATIVE is 0.

    Arguments:
        functions: what the library must hold.
    """
    if _left_out() is not None:
        return None
    try:
        return _load(source, functions)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        reason = next((line for line in lines if "error" in line), (lines or [str(error)])[0])
    # Also of `Path.home`, where nobody says who the user is, and of a compiler that hangs.
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = str(error)
    _warn_once(
        f"{source.name} is not compiled, and torch's operators, which are slower, take its place: "
        f"{reason}"
    )
    return None


@functools.cache
def obstacle() -> str | None:
    """Why no C++ can be compiled here, or None."""
    return _left_out() or (_NO_COMPILER if _compiler() is None else None)


def _left_out() -> str | None:
    """Why none is to be, or None."""
    if os.environ.get("KANLM_NATIVE") == "0":
        return "KANLM_NATIVE is 0"
    if sys.platform != "linux":
        return f"the native kernels are for Linux, and this is {sys.platform}"
    return None


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds its numbers where `data_ptr` says.

    Subclasses need not, nor do those that torch.func's transforms wrap, nor views that negate.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_neg():
        return False
    return not is_functorch_wrapped_tensor(tensor)


def holds_floats(x: Tensor) -> bool:
    """Whether x is what functions over rows take: float32 on a CPU."""
    return is_plain(x) and x.device.type == "cpu" and x.dtype == torch.float32


def declare(function: Any, options: Sequence[Any], *, tensors: int) -> None:
    """State the arguments of a function that `call` calls, of which `options` are the first."""
    pointers = [ctypes.c_void_p, ctypes.c_int64] * tensors
    function.argtypes = [*options, *pointers, *[ctypes.c_int64] * 3]
    function.restype = None


def call(function: Any, options: Sequence[Any], x: Tensor, *others: Tensor) -> None:
    """Call a function over rows: options, every tensor's place and the distance between its
    rows, rows, inputs, threads.

    Arguments:
        x: (N, in).
        others: (N, …), the last to be written to. Those that are read are copied where their
            rows are not contiguous.
    """
    *read, written = (x, *others)
    read = [t if t.numel() == 0 or t[0].is_contiguous() else t.contiguous() for t in read]
    assert written.numel() == 0 or written[0].is_contiguous()
    tensors = [part for t in (*read, written) for part in (t.data_ptr(), t.stride(0))]
    function(*options, *tensors, *x.shape, torch.get_num_threads())


def _compiler() -> str | None:
    # Not clang++, whose OpenMP would bring a second pool of threads beside torch's.
    names = [os.environ.get("CXX"), "g++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _load(source: Path, functions: Sequence[str]) -> ctypes.CDLL:
    compiler = _compiler()
    if compiler is None:
        raise OSError(_NO_COMPILER)
    library = _cache_folder() / f"{source.stem}-{_fingerprint(source, compiler)}.so"
    # What is damaged is made again.
    with contextlib.suppress(OSError):
        return _opened(library, functions)
    _compile(source, compiler, library)
    return _opened(library, functions)


def _opened(library: Path, functions: Sequence[str]) -> ctypes.CDLL:
    """
    Raises:
        OSError: there is no such library, or it lacks a function.
    """
    opened = ctypes.CDLL(str(library))
    for name in functions:
        if not hasattr(opened, name):
            raise OSError(f"{library} has no function {name}")
    return opened


def _compile(source: Path, compiler: str, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        draft = Path(folder) / library.name
        _run(compiler, *_FLAGS, str(source), "-o", str(draft))
        draft.replace(library)


def _run(*command: str) -> bytes:
    """What a command prints. A compiler takes seconds, and one that hangs is none."""
    done = subprocess.run(command, check=True, capture_output=True, timeout=_LONGEST)
    return done.stdout


def _warn_once(message: str) -> None:
    """The first file's reason is nearly always that of the others, too."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(message, stacklevel=3)


def _cache_folder() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The specification has relative ones ignored: they would be another folder in every place.
    return (root if root.is_absolute() else Path.home() / ".cache") / "kanlm" / "kernels"


def _fingerprint(source: Path, compiler: str) -> str:
    version = _run(compiler, "--version")
    sources = [path.read_bytes() for path in (source, *_HEADERS)]
    parts = (*sources, " ".join(_FLAGS).encode(), version, _processor())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> bytes:
    """What `-march=native` goes by: a home folder may be shared between machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return "\n".join([platform.machine(), *flags]).encode()
