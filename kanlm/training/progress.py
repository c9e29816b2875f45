"""How far a run or a study is, and how long it will yet take.

One line a run that always fits the terminal, drawn again twice a second; where the output is
no terminal, plain lines, one a minute.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from kanlm.config import TrainingSettings

#: Seconds between plain lines.
SPARSE = 60.0
#: Share of the width for a name; a longer one shows its end, which tells runs apart.
NAME = 1 / 3
#: Of the bar, at least and at most.
BAR = (8, 24)


def time_left(seconds: float | None) -> str:
    """In at most two units: `45 s left`, `12 min left`, `3 h 20 min left`, `2 d 4 h left`."""
    if seconds is None:
        return "time left unknown"
    whole = max(0, round(seconds))
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if whole >= size:
            count, rest = divmod(round(whole / part), size // part)
            return f"{count:,} {unit}{f' {rest} {smaller}' if rest else ''} left"
    return f"{round(whole / 60)} min left" if whole >= 90 else f"{whole} s left"


class Pace:
    """Seconds that a run will yet take, from what its parts have taken so far.

    Args:
        before: seconds that an update took before a resume; None where there was none.
    """

    def __init__(self, before: float | None) -> None:
        self._before = before
        self._seconds: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, seconds: float) -> None:
        """Take one part into account: an `update`, or what comes between two."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        self._counts[name] = self._counts.get(name, 0) + 1

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Take what the block does into account."""
        started = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - started)

    def seconds_left(
        self, coming: Mapping[str, int], *, begun: float = 0.0, share: float = 0.0
    ) -> float | None:
        """What is yet to come, each part at its mean so far; None while nothing is known.

        Args:
            coming: how many of each part, the present update included.
            begun: seconds since the present update began.
            share: of it that is done.
        """
        means = {name: self._seconds[name] / count for name, count in self._counts.items()}
        if "update" not in means:
            if self._before is None and not share:
                return None
            means["update"] = begun / share if self._before is None else self._before
        total = sum(means.get(name, 0.0) * count for name, count in coming.items())
        return total - share * means["update"]


def parts_left(training: TrainingSettings, step: int) -> dict[str, int]:
    """How often what takes time is yet to come after `step` updates."""

    def coming(every: int | None) -> int:
        """Of what is done every so many updates, and at the end."""
        if step == training.steps:
            return 0
        return 1 if every is None else -(-training.steps // every) - step // every

    return {
        "update": training.steps - step,
        "validation": coming(training.evaluate_every),
        "sample": coming(training.sample_every),
        "checkpoint": coming(training.checkpoint_every),
    }


@dataclass
class Task:
    """One run on the display."""

    name: str
    #: Updates.
    total: int
    done: float = 0
    #: Of the last log line, the first first to be shown.
    figures: list[str] = field(default_factory=list)
    #: Seconds, as of `since`; None is not known.
    left: float | None = None
    since: float = field(default_factory=time.monotonic)
    #: When a plain line was written.
    written: float = -SPARSE

    def seconds_left(self) -> float | None:
        if self.left is None:
            return None
        return max(0.0, self.left - (time.monotonic() - self.since))


def figures(values: Mapping[str, Any]) -> list[str]:
    """What is shown of a training line in metrics.jsonl."""
    return [
        f"loss {values['loss']:.3f} nats",
        f"{values['bits_per_byte']:.3f} bits/byte",
        f"{values['tokens_per_second']:,.0f} tokens/s",
    ]


def line(task: Task, width: int, *, bar: bool = True) -> str:
    """The run in a line of at most `width` characters.

    Count and time left are always there; figures that do not fit are omitted.
    """
    longest = max(2, int(NAME * width))
    name = task.name if len(task.name) <= longest else f"…{task.name[1 - longest :]}"
    parts = [f"{int(task.done):,}/{task.total:,}", time_left(task.seconds_left())]
    if len(", ".join([name, *parts])) > width:
        name = ""
    for figure in task.figures:
        if len(", ".join([name, *parts, figure])) <= width:
            parts.append(figure)
    text = ", ".join(parts)
    room = min(BAR[1], width - len(name) - len(text) - 2)
    if not bar or room < BAR[0]:
        return f"{name} {text}".strip()
    full = round(room * min(1.0, task.done / max(task.total, 1)))
    return f"{name} {'━' * full}{'─' * (room - full)} {text}".strip()


class Display:
    """Context manager that shows tasks below what is printed.

    Args:
        console: where.
        disable: show nothing.
    """

    def __init__(self, console: Console, *, disable: bool = False) -> None:
        self.console, self.disable = console, disable
        self.tasks: list[Task] = []
        #: A last line about all of them.
        self.whole: Task | None = None
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if not self.disable and self.console.is_terminal:
            self._live = Live(console=self.console, get_renderable=self._text, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            return
        for task in self.tasks:
            self._write(task)

    def add(self, name: str, total: int, done: float = 0) -> Task:
        task = Task(name, total, done)
        self.tasks.append(task)
        return task

    def update(self, task: Task, done: float, left: float | None) -> None:
        """Move a task on, with the seconds that it will yet take."""
        task.done, task.left, task.since = done, left, time.monotonic()
        if self._live is None and time.monotonic() - task.written >= SPARSE and task.figures:
            self._write(task)

    def remove(self, task: Task) -> None:
        self.tasks.remove(task)

    def _write(self, task: Task) -> None:
        if not self.disable:
            task.written = time.monotonic()
            width = 1_000_000
            self.console.print(line(task, width, bar=False), markup=False, soft_wrap=True)

    def _text(self) -> Text:
        shown = [*self.tasks, *([] if self.whole is None else [self.whole])]
        lines = [line(task, self.console.width) for task in shown]
        return Text("\n".join(lines), no_wrap=True, overflow="ignore")
