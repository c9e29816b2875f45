"""Where the time goes: seconds by phase, without waiting for the device."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Phases:
    """A stopwatch for the parts of training.

    A GPU is still at work when Python has gone on: there, events in its own queue tell when
    a phase began and ended, and are read when a log line waits for the device anyway.

    Arguments:
        device: where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count the block as this phase's."""
        if self.on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - started

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last reading, as `phase_seconds/PHASE`.

        On a GPU this waits for the last phase to end.
        """
        for name, start, end in self._events:
            end.synchronize()
            self._seconds[name] += start.elapsed_time(end) / 1000
        found = {f"phase_seconds/{name}": seconds for name, seconds in self._seconds.items()}
        self._events.clear()
        self._seconds.clear()
        return found
