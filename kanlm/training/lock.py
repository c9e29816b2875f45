"""One job in one run folder, however often it is started.

The operating system gives the lock back when the process dies, by whatever cause.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from kanlm.errors import UserError
from kanlm.files import cannot_write

_NAME = ".lock"


def check_free(folder: Path) -> None:
    """Check that no job is at work in a folder, before anything is prepared for it.

    Raises:
        UserError: naming the job.
    """
    try:
        file = (folder / _NAME).open()
    except OSError:
        return
    with file:
        _lock(file, fcntl.LOCK_SH, folder)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other jobs out of a folder, which is made if it is not there and goes if it is empty.

    Raises:
        UserError: another job is at work there, or the folder cannot be written.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    path = folder / _NAME
    try:
        with _opened(path, folder) as file:
            try:
                file.truncate()
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
            except OSError as error:
                raise cannot_write(path, error) from None
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    finally:
        with suppress(OSError):
            for place in made:
                place.rmdir()


def _opened(path: Path, folder: Path) -> IO[str]:
    """The lock's file, locked."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise cannot_write(path, error) from None
        file = os.fdopen(descriptor, "r+")
        try:
            _lock(file, fcntl.LOCK_EX, folder)
            # Another job may have deleted it before it let go.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(file: IO[str], kind: int, folder: Path) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"output_dir = {folder} is in use by {file.read().strip() or 'another job'}; "
            "wait for it, or choose another output_dir"
        ) from None
    except OSError as error:
        raise cannot_write(folder / _NAME, error) from None
