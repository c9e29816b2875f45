"""Stopping at the end of a step when a signal asks for it, or when the time is over."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from kanlm.errors import EXIT_TIME_LIMIT

#: Ctrl-C, what batch systems and `kill` send, and what SLURM is asked to send ahead of those.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
#: Exit codes of a run that saved itself, in the order in which processes agree on one.
EXIT_CODES = (*(128 + number for number in SIGNALS), EXIT_TIME_LIMIT)


class Stop:
    """Whether this process is asked to stop, and with which exit code.

    Args:
        time_limit: seconds from now, on a monotonic clock; None is no limit.
    """

    def __init__(self, time_limit: float | None) -> None:
        self.signal: int | None = None
        self.deadline = None if time_limit is None else time.monotonic() + time_limit

    @property
    def exit_code(self) -> int | None:
        """Of the first signal or the time limit; None where neither has come."""
        if self.signal is not None:
            return 128 + self.signal
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return EXIT_TIME_LIMIT
        return None

    @contextmanager
    def catching_signals(self, report: Callable[[str], None]) -> Iterator[None]:
        """Note the first signal instead of stopping; a second SIGINT stops at once."""

        def note(number: int, frame: FrameType | None) -> None:
            self.signal = number
            signal.signal(signal.SIGINT, signal.default_int_handler)
            report("stopping after this update; Ctrl-C again stops without saving")

        before = {number: signal.signal(number, note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class StopRequested(Exception):
    """A stop is wanted, and what is being done after a step is left to the resumed run."""


def agreed_exit_code(stops: Sequence[float]) -> int | None:
    """The exit code on which ranks agree, from how many of them stop with each of `EXIT_CODES`."""
    return next((code for code, n in zip(EXIT_CODES, stops, strict=True) if n), None)
