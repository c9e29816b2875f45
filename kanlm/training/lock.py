"""One job in one run folder, however often it is started.

The operating system gives the lock back when the process dies, by whatever cause.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from kanlm.errors import UserError
from kanlm.files import cannot_write, said_of

_NAME = ".lock"
#: Seconds in which a lock is taken whose file a job deletes as it ends.
_PATIENCE = 0.1


def check_free(folder: Path) -> None:
    """Check that no job is at work in a folder, before anything is prepared for it.

    Raises:
        UserError: naming the job.
    """
    path = folder / _NAME
    if path.exists():
        with _acquired(path, folder):
            pass


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other jobs out of a folder, which is made if it is not there and goes if it is empty.

    Raises:
        UserError: another job is at work there, or the folder cannot be written.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    path = folder / _NAME
    try:
        with said_of(path):
            folder.mkdir(parents=True, exist_ok=True)
        with _acquired(path, folder):
            with said_of(path):
                path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    finally:
        with suppress(OSError):
            for place in made:
                place.rmdir()


@contextmanager
def _acquired(path: Path, folder: Path) -> Iterator[None]:
    """Hold the lock.

    Raises:
        UserError: another job holds it, or its file cannot be written.
    """
    holder = ""
    # A soft lock would outlive a killed process.
    lock = FileLock(path, timeout=_PATIENCE, poll_interval=_PATIENCE / 10, fallback_to_soft=False)
    try:
        acquired = lock.acquire()
    except Timeout:
        with suppress(OSError):
            holder = path.read_text().strip()
        raise UserError(
            f"output_dir = {folder} is in use by {holder or 'another job'}; "
            "wait for it, or choose another output_dir"
        ) from None
    except OSError as error:
        raise cannot_write(path, error) from None
    with acquired:
        yield
