"""Writing that leaves either the whole file or folder, or nothing.

Everything is written under another name, flushed to disk and moved into place. A link that
somebody left under such a name is not followed, so nothing is written outside the folder.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from kanlm.errors import UserError
from kanlm.faults import fault_point


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends without an error.

    Raises:
        UserError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    draft = target.with_name(f".{target.name}.draft")
    _remove(draft)
    try:
        draft.mkdir(parents=True)
        yield draft
        # Some libraries write for the owner alone; the folder's mode is what the user wants.
        mode = draft.stat().st_mode & 0o666
        for path in draft.rglob("*"):
            if path.is_file():
                path.chmod(mode)
            flush(path)
        flush(draft)
        remove_folder(target)
        draft.rename(target)
        flush(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise cannot_write(target, error) from None
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def remove_folder(folder: Path) -> None:
    """Delete a folder, if it is there, such that it is never seen half deleted."""
    if folder.is_symlink():
        raise OSError(errno.ELOOP, "it is a link to another folder")
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.deleted")
        _remove(doomed)
        folder.rename(doomed)
        fault_point("inside-pruning")
        _remove(doomed)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left of drafts and of deleted folders in `folder`."""
    for pattern in (".*.draft", ".*.deleted"):
        for path in folder.glob(pattern):
            _remove(path)


@contextmanager
def write_errors_as_user_errors(target: Path) -> Iterator[None]:
    """Around what is written for `target`.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise cannot_write(target, error) from None


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one move, in a folder in which no other process writes it.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    with write_errors_as_user_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.draft")
        write_atomically(path, lambda file: file.write(text.encode()), draft)


def write_atomically(
    path: Path, write: Callable[[IO[bytes]], Any], draft: Path | None = None
) -> None:
    """Let `write` fill another file, flush it to the disk, and move it into place.

    Args:
        draft: that file; by default one that no other process writes.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    draft = draft or path.with_name(f".{path.name}.{os.getpid()}.draft")
    draft.unlink(missing_ok=True)
    try:
        with draft.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise


def cannot_write(path: Path | str, error: Exception, advice: str = "") -> UserError:
    """Say in a line why a file or folder cannot be written, and what to do."""
    reason = getattr(error, "strerror", None) or str(error)
    full = "no space is left on the disk"
    said = f"{path} cannot be written: {full if disk_is_full(error) else reason}"
    return UserError(f"{said}; {advice}" if advice else said)


def disk_is_full(error: Exception) -> bool:
    """Whether a write failed for want of space."""
    number = getattr(error, "errno", None)
    # numpy gives no number where the disk fills up in the middle of an array.
    cut_short = number is None and "requested and" in str(error)
    full = number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    return full or cut_short


def _remove(path: Path) -> None:
    """Delete a file, a link or a folder as far as that is possible."""
    if path.is_symlink() or path.is_file():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
