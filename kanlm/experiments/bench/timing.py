"""Times of several functions, taken in turn."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch


def interleaved(
    functions: Mapping[str, Callable[[], object]], rounds: int, synchronize: Callable[[], object]
) -> dict[str, list[float]]:
    """Seconds of every function in every round, each called once a round.

    Whatever slows the machine for a while then slows all alike. Two calls each before the first
    round compile, allocate and fill caches.

    Arguments:
        synchronize: called before the clock is read, for devices that run ahead.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Median over rounds of seconds / reference, and its quartiles."""
    ratios = [one / other for one, other in zip(seconds, reference, strict=True)]
    low, middle, high = (
        statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    )
    return {"median": middle, "low": low, "high": high}


def synchronizer(device: str) -> Callable[[], object]:
    """What waits for a device to have done all that it was asked."""
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None
