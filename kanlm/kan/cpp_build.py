"""Compile the C++ files of this package when they are first used, and load them.

Torch's own operators are enough to compute everything, so that a missing or broken compiler costs
speed and nothing else: whatever fails ends in one warning.

Libraries are kept in `$XDG_CACHE_HOME/kanlm/kernels` (`~/.cache/kanlm/kernels`), under a name made
of the source, the compiler and the processor. They run with all of the user's rights, so they are
loaded only from a folder that belongs to the user and that nobody else may write to.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

#: No `-ffast-math`: it would have every program that loads the library flush small numbers.
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++17", "-shared", "-fPIC")

#: Seconds that a compiler may take, and that another process is waited for.
_COMPILE_SECONDS = 300

#: Days after which a library that no process has loaded is removed.
_UNUSED_DAYS = 30
_DAY = 24 * 60 * 60

#: What sources may include.
_HEADERS = sorted(Path(__file__).parent.rglob("*.h"))

_warned = False


@functools.cache
def load_library(source: Path, *functions: str) -> ctypes.CDLL | None:
    """Compile a C++ file, unless the cache folder has it, and load it.

    One process compiles, and others that need the same file wait for it.

    Args:
        functions: names that the library must define.

    Returns:
        The library; or None, and in a process one warning, if that fails. Also None, without a
        warning, on other systems than Linux and if KANLM_NATIVE is 0.
    """
    if _disabled() is not None:
        return None
    try:
        return _load(source, functions)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        reason = next((line for line in lines if "error" in line), (lines or [str(error)])[0])
    # RuntimeError is that of `Path.home` for a user without a home, ValueError that of `shlex`.
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        reason = str(error)
    _warn_once(f"{source.name} is not compiled; torch's slower operators are used: {reason}")
    return None


@functools.cache
def obstacle() -> str | None:
    """Why no C++ can be compiled here, or None."""
    reason = _disabled()
    if reason is None:
        try:
            _compiler()
        except (OSError, ValueError) as error:
            reason = str(error)
    return reason


def _disabled() -> str | None:
    """Why nothing is compiled although it might be, or None."""
    if os.environ.get("KANLM_NATIVE") == "0":
        return "KANLM_NATIVE is 0"
    if sys.platform != "linux":
        return f"the C++ kernels are for Linux, and this is {sys.platform}"
    return None


def _load(source: Path, functions: Sequence[str]) -> ctypes.CDLL:
    # Late, because few processes compile anything. Torch depends on it.
    from filelock import FileLock

    compiler = _compiler()
    folder = cache_folder("kernels")
    library = folder / f"{source.stem}-{_fingerprint(source, compiler)}.so"
    # A damaged library is compiled again.
    with contextlib.suppress(OSError):
        return _opened(library, functions)
    with FileLock(folder / f"{source.stem}.lock", timeout=_COMPILE_SECONDS):
        # Another process may have compiled it meanwhile.
        with contextlib.suppress(OSError):
            return _opened(library, functions)
        _compile(source, compiler, library)
        _remove_unused(folder)
    return _opened(library, functions)


def _opened(library: Path, functions: Sequence[str]) -> ctypes.CDLL:
    """
    Raises:
        OSError: there is no such library, others may write to it, or it lacks a function.
    """
    _check_private(library)
    opened = ctypes.CDLL(str(library))
    for name in functions:
        if not hasattr(opened, name):
            raise OSError(f"{library} has no function {name}")
    # Its date says when it was last used.
    with contextlib.suppress(OSError):
        os.utime(library)
    return opened


def _compiler() -> list[str]:
    """The command that CXX names, such as `ccache g++`, else g++.

    Raises:
        OSError: there is no such program.
        ValueError: CXX cannot be split into words.
    """
    # Not clang++, whose OpenMP would bring a second pool of threads beside torch's.
    named = os.environ.get("CXX", "")
    program, *options = shlex.split(named) or ["g++"]
    path = shutil.which(program)
    if path is None:
        raise OSError(
            f"CXX = {named!r}: there is no program {program}"
            if named
            else "there is no C++ compiler: install g++, or set CXX"
        )
    return [path, *options]


def _compile(source: Path, compiler: Sequence[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        draft = Path(folder) / library.name
        _run(*compiler, *_FLAGS, str(source), "-o", str(draft))
        draft.chmod(0o700)
        draft.replace(library)


def _remove_unused(folder: Path) -> None:
    """Remove libraries that have not been used for long, and folders of killed compilers."""
    now = time.time()
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            days = (now - path.lstat().st_mtime) / _DAY
            if path.suffix == ".so" and days > _UNUSED_DAYS:
                path.unlink()
            elif path.is_dir() and days > 1:
                shutil.rmtree(path)


def _run(*command: str) -> bytes:
    """What a command prints.

    Raises:
        OSError: it cannot be run.
        subprocess.SubprocessError: it fails, or takes too long.
    """
    done = subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_SECONDS)
    return done.stdout


def _warn_once(message: str) -> None:
    """The first file's reason is nearly always that of the others, too."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(message, stacklevel=3)


def cache_folder(name: str) -> Path:
    """The folder of this name in kanlm's cache, which only the user writes to; made if missing.

    Raises:
        OSError: it cannot be made, belongs to somebody else, or others may write to it.
        RuntimeError: the user has no home.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The specification has relative ones ignored: they would be another folder in every place.
    if not root.is_absolute():
        root = Path.home() / ".cache"
    if not root.is_absolute():
        raise OSError(f"HOME = {os.environ.get('HOME')!r} is not an absolute path")
    folder = root / "kanlm" / name
    for part in (*reversed(folder.parents), folder):
        part.mkdir(mode=0o700, exist_ok=True)
    folder = folder.resolve()
    _check_private(folder)
    return folder


def _check_private(path: Path) -> None:
    """
    Raises:
        OSError: it is missing, belongs to somebody else, or others may write to it.
    """
    status, user = path.stat(), os.geteuid()
    if status.st_uid != user:
        raise OSError(
            f"{path} belongs to user {status.st_uid}, and this is user {user}; "
            "set XDG_CACHE_HOME to a folder of your own"
        )
    if status.st_mode & 0o022:
        raise OSError(f"other users may write to {path}; run chmod go-w {path}")


def _fingerprint(source: Path, compiler: Sequence[str]) -> str:
    version = _run(*compiler, "--version")
    sources = [path.read_bytes() for path in (source, *_HEADERS)]
    parts = (*sources, " ".join((*compiler[1:], *_FLAGS)).encode(), version, processor())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def processor() -> bytes:
    """What `-march=native` goes by: a home folder may be shared between machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return "\n".join([platform.machine(), *flags]).encode()
