"""Writing that leaves either the whole file or folder, or nothing.

Everything is written under another name, flushed to disk and moved into place. A link that
somebody left under such a name is not followed, so nothing is written outside the folder.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from kanlm.errors import UserError
from kanlm.faults import point


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
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
        discard(target)
        draft.rename(target)
        flush(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise cannot_write(target, error) from None
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def discard(folder: Path) -> None:
    """Delete a folder, if it is there, such that it is never seen half deleted."""
    if folder.is_symlink():
        raise OSError(errno.ELOOP, "it is a link to another folder")
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.deleted")
        _remove(doomed)
        folder.rename(doomed)
        point("inside-pruning")
        _remove(doomed)


def sweep(folder: Path) -> None:
    """Delete what killed processes left of drafts and of deleted folders in `folder`."""
    for pattern in (".*.draft", ".*.deleted"):
        for path in folder.glob(pattern):
            _remove(path)


@contextmanager
def said_of(target: Path) -> Iterator[None]:
    """Around what is written for `target`.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise cannot_write(target, error) from None


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one move.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.unlink(missing_ok=True)
        with draft.open("x", encoding="utf-8") as file:
            file.write(text)
        flush(draft)
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: Exception) -> UserError:
    """Say in a line why a file or folder cannot be written."""
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(
        f"{path} cannot be written: {'no space is left on the disk' if full else reason}"
    )


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
