"""Stopping at the end of a step when a signal asks for it."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignal:
    """SIGINT or SIGTERM, once one has come."""

    def __init__(self) -> None:
        self.number: int | None = None

    @contextmanager
    def noted(self, report: Callable[[str], None]) -> Iterator[None]:
        """Note the first signal instead of stopping; a second SIGINT stops at once."""

        def note(number: int, frame: FrameType | None) -> None:
            self.number = number
            signal.signal(signal.SIGINT, signal.default_int_handler)
            report("stopping after this step; Ctrl-C again stops without saving")

        before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
