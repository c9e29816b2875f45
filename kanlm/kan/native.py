"""C++ beside this file, compiled when it is first asked for.

Torch's own operators are enough to compute everything here, so a missing compiler costs speed
and nothing else. The library is kept in the user's cache folder, under a name made of the
source, the compiler and the processor.
"""

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


#: What sources may include.
_HEADERS = sorted(Path(__file__).parent.rglob("*.h"))


@functools.cache
def load_library(source: Path) -> ctypes.CDLL | None:
    """Compile a C++ file and load it; None where that is not possible (`obstacle` says why)."""
    return None if obstacle() else _load(source)


@functools.cache
def obstacle() -> str | None:
    """Why no C++ can be compiled here, or None."""
    if os.environ.get("KANLM_NATIVE") == "0":
        return "KANLM_NATIVE is 0"
    if sys.platform != "linux":
        return f"the native kernels are for Linux, and this is {sys.platform}"
    if _compiler() is None:
        return "there is no C++ compiler: g++, or what CXX names"
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


def _load(source: Path) -> ctypes.CDLL | None:
    compiler = _compiler()
    assert compiler is not None
    library = _cache_folder() / f"{source.stem}-{_fingerprint(source, compiler)}.so"
    try:
        if not library.exists():
            _compile(source, compiler, library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        reason = str(error)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip() or "no reason given").splitlines()[0]
    warnings.warn(f"{source.name} is not compiled, and is slower for it: {reason}", stacklevel=2)
    return None


def _compile(source: Path, compiler: str, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        draft = Path(folder) / library.name
        command = [compiler, *_FLAGS, str(source), "-o", str(draft)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        draft.replace(library)


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "kanlm" / "kernels"


def _fingerprint(source: Path, compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout
    sources = [path.read_bytes() for path in (source, *_HEADERS)]
    parts = (*sources, " ".join(_FLAGS).encode(), version, _processor())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> bytes:
    """What `-march=native` goes by: a home folder may be shared between machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return "\n".join([platform.machine(), *flags]).encode()
