"""Writing that leaves either the whole file or folder, or nothing.

Everything is written under another name, flushed to disk and moved into place.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from kanlm.errors import UserError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends without an error.

    Raises:
        UserError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    draft = target.with_name(f".{target.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        yield draft
        # Some libraries write for the owner alone; the folder's mode is what the user wants.
        mode = draft.stat().st_mode & 0o666
        for path in draft.rglob("*"):
            if path.is_file():
                path.chmod(mode)
                _flush(path)
        _flush(draft)
        if target.exists():
            shutil.rmtree(target)
        draft.rename(target)
        _flush(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise cannot_write(target, error) from None
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one move.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text)
        _flush(draft)
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


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
