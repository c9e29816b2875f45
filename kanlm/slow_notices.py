"""Saying what takes long: nothing for two seconds, and then one line."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Seconds after which people wonder.
PATIENCE = 2.0


@contextmanager
def announce_if_slow(what: str, report: Callable[[str], None]) -> Iterator[None]:
    """Report what the block does once it has taken two seconds.

    Args:
        what: as a line, such as `building the model`.
        report: called from another thread, at most once.
    """
    timer = threading.Timer(PATIENCE, report, [f"{what} …"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def announce_slow_imports() -> Iterator[None]:
    """Say on a terminal that libraries are being loaded, if they are so after two seconds.

    On standard error, because some verbs print what programs read.
    """

    def report(line: str) -> None:
        loading = [m for m in list(sys.modules.values()) if _is_loading(m)]
        if loading and sys.stderr.isatty():
            print(line, file=sys.stderr)

    with announce_if_slow("loading torch and transformers", report):
        yield


def _is_loading(module: object) -> bool:
    """Whether a module's code is being run, as Python's own import machinery marks it."""
    return getattr(getattr(module, "__spec__", None), "_initializing", False)
