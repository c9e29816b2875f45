"""Starting a study's runs, each as a process of its own, one after another or side by side.

A run is started by the command a user would type, from the config.yaml that lies in its
folder, so that any figure can be reproduced alone. A process each keeps one arm's peak
memory out of another's.

Side by side, the runs share the CPU: each gets its part of the threads, writes what it
prints to log.txt in its folder, and has a progress bar here that is read off its
metrics.jsonl. Small models gain from this, because threads that wait for each other over
small matrices cost more than processes that do not.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from kanlm.config import Config
from kanlm.errors import Interrupted, UserError
from kanlm.experiments.sweep import has_diverged
from kanlm.training.progress import Display, Task, figures, time_left
from kanlm.training.run_folder import claim, is_finished, write_config
from kanlm.training.stopping import EXIT_CODES, SIGNALS
from kanlm.training.tracking import console, print_line
from kanlm.untrusted_io import parse_object

#: Seconds between looks at the processes.
_PATIENCE = 0.2
#: Bytes at the end of a metrics file in which its last line is looked for.
_TAIL = 1 << 18
#: What a progress bar shows of a line.
_SHOWN = ("step", "loss", "bits_per_byte", "tokens_per_second")


def run_chains(
    chains: Sequence[Sequence[Config]],
    *,
    parallel: int,
    launcher: str | None,
    root: Path,
    whole: "StudyProgress | None" = None,
    or_give_up: bool = False,
) -> None:
    """Bring all runs to their end: those of a chain in order, chains side by side.

    A finished run is skipped and an interrupted one resumed. When one fails, the others
    are told to save themselves.

    Args:
        chains: configurations of runs, each chain's later ones starting from its earlier.
        parallel: processes at a time.
        launcher: command that starts a run in place of this Python.
        root: the study's folder, under which runs are named.
        whole: the study of which these are runs, to say how far it is; None for these alone.
        or_give_up: whether a run may give up because it diverged, which ends its chain alone.

    Raises:
        UserError: a run failed otherwise.
        Interrupted: a signal stopped the runs in progress, which saved themselves.
    """
    waiting = deque(deque(chain) for chain in chains)
    whole = whole or StudyProgress([run for chain in chains for run in chain])
    active: list[_Process] = []
    with _signals_passed_on(active) as received, _display(parallel, whole) as display:
        try:
            while waiting or active:
                while waiting and len(active) < parallel and not received:
                    _start_next(waiting, active, parallel, launcher, root, display, whole)
                    if received and active:
                        # It came while the process was started, and was not passed on to it.
                        active[-1].popen.terminate()
                for process in [p for p in active if p.ended()]:
                    active.remove(process)
                    whole.end(process.config)
                    if code := process.check(asked=bool(received), or_give_up=or_give_up):
                        received.append(code)
                    elif not is_finished(Path(process.config.output_dir)):
                        print_line(f"{process.name} diverged; the others go on")
                    elif process.later:
                        waiting.appendleft(process.later)
                if received and not active:
                    raise Interrupted(received[0])
                if parallel > 1:
                    whole.show([process.config for process in active])
                    time.sleep(_PATIENCE)
        except UserError:
            for process in active:
                process.popen.terminate()
            for process in active:
                process.popen.wait()
            raise


@dataclass
class _Process:
    """One run in progress, and what its chain holds after it."""

    config: Config
    name: str
    popen: Any
    command: list[str]
    #: Whether a launcher starts it.
    launched: bool
    later: deque[Config]
    parallel: int
    display: Display
    task: Task | None
    #: When a line was first seen, and its step.
    first: tuple[float, int] | None = None

    def ended(self) -> bool:
        """Whether the process is over; one that has the terminal to itself is waited for."""
        if self.parallel == 1:
            self.popen.wait()
            return True
        code = self.popen.poll()
        self._show()
        return code is not None

    def check(self, *, asked: bool, or_give_up: bool) -> int | None:
        """Return the exit code with which it stopped and saved itself, or None.

        A run that has begun saves itself and ends with a code of its own; one that was still
        starting up is ended by the signal, and has nothing to save. A launcher has its own
        codes for the end of what it started.

        Args:
            asked: whether the runs have been asked to stop.
            or_give_up: whether it may have diverged.

        Raises:
            UserError: it failed.
        """
        code = self.popen.wait()
        if code in EXIT_CODES:
            return code
        if -code in SIGNALS:
            return 128 - code
        if asked and code and self.launched:
            return 128 + signal.SIGTERM
        gave_up = or_give_up and has_diverged(self.config)
        if code and not gave_up:
            log = Path(self.config.output_dir) / "log.txt"
            if self.parallel > 1:
                print(log.read_text()[-2000:], file=sys.stderr, end="")
            raise UserError(
                f"{self.name} ended with exit code {code}, see "
                f"{'above' if self.parallel == 1 else log}; "
                f"to run it alone: {shlex.join(self.command)}"
            )
        if self.task is not None:
            self.display.remove(self.task)
            if not gave_up:
                print_line(f"{self.name} is done")
        return None

    def _show(self) -> None:
        line = _last_training_line(Path(self.config.output_dir) / "metrics.jsonl")
        if self.task is None or line is None:
            return
        self.task.figures = figures(line)
        if line["step"] != self.task.done:
            now = time.monotonic()
            # Two lines of this start tell its pace, evaluation and checkpoints included.
            if self.first is None:
                self.first = now, line["step"]
            began, first = self.first
            pace = (now - began) / max(line["step"] - first, 1) if line["step"] > first else None
            left = None if pace is None else pace * (self.task.total - line["step"])
            self.display.update(self.task, line["step"], left)


def _start_next(
    waiting: deque[deque[Config]],
    active: list[_Process],
    parallel: int,
    launcher: str | None,
    root: Path,
    display: Display,
    whole: "StudyProgress",
) -> None:
    """Start the first run of the first chain, unless it is finished."""
    chain = waiting.popleft()
    if not chain:
        return
    config = chain.popleft()
    folder = Path(config.output_dir)
    claim(folder, config)
    if is_finished(folder):
        whole.end(config, now=False)
        waiting.appendleft(chain)
        return
    write_config(folder, config)
    verb = "pretrain" if config.initialize_from is None else "finetune"
    python = shlex.split(launcher) if launcher else [sys.executable]
    command = [*python, "-m", "kanlm", verb, str(folder / "config.yaml")]
    name = str(folder.relative_to(root))
    task = None
    position, left = whole.position(config), whole.seconds_left([])
    print_line(f"{position}: {name}{'' if left is None else f', {time_left(left)} in all'}")
    if parallel == 1:
        popen = subprocess.Popen(command)
    else:
        task = display.add(name, config.training.steps)
        with (folder / "log.txt").open("ab") as log:
            popen = subprocess.Popen(
                command, env=_environment(parallel), stdout=log, stderr=subprocess.STDOUT
            )
    active.append(
        _Process(config, name, popen, command, bool(launcher), chain, parallel, display, task)
    )


def _environment(parallel: int) -> dict[str, str]:
    """This process's, with a run's part of the CPU threads, unless the user set them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"OMP_NUM_THREADS": str(max(1, (cores or 1) // parallel)), **os.environ}


def _last_training_line(path: Path) -> dict[str, Any] | None:
    """The last whole `train` line near the end of a metrics file that can be shown."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - _TAIL)
        file.seek(start)
        whole = file.read().split(b"\n")[1 if start else 0 : -1]
    for line in reversed(whole):
        if line.startswith(b'{"kind": "train"'):
            with suppress(ValueError):
                values = parse_object(line, finite=False)
                if all(isinstance(values.get(name), int | float) for name in _SHOWN):
                    return values
    return None


class StudyProgress:
    """How far all the runs of a study are, and how long they will yet take.

    Args:
        runs: their configurations.
    """

    def __init__(self, runs: Sequence[Config]) -> None:
        self.expect(runs)
        self.ended: set[str] = set()
        self.started: list[str] = []
        self.began = time.monotonic()
        #: Steps done since then by runs that have ended, and what those had before it.
        self.done = 0
        self.before: dict[str, int] = {}
        self.task: Task | None = None

    def expect(self, runs: Sequence[Config]) -> None:
        """Say which runs there are, where that was not known before."""
        self.steps = {run.output_dir: run.training.steps for run in runs}

    def end(self, run: Config, *, now: bool = True) -> None:
        """Count a run as over: one that was in progress `now`, or was before."""
        if now and run.output_dir not in self.ended:
            self.done += run.training.steps - self.before.get(run.output_dir, 0)
        self.ended.add(run.output_dir)

    def position(self, run: Config) -> str:
        """Which of the runs this is that begins: `run 7 of 18`."""
        self.before[run.output_dir] = _step(run)
        self.started.append(run.output_dir)
        over = self.ended - set(self.started)
        return f"run {len(over) + len(self.started)} of {len(self.steps)}"

    def seconds_left(self, active: Sequence[Config]) -> float | None:
        """By the steps done since the start, runs in progress included; None before the first."""
        present = {run.output_dir: _step(run) for run in active}
        done = self.done + sum(step - self.before[name] for name, step in present.items())
        if done <= 0:
            return None
        left = sum(n for name, n in self.steps.items() if name not in self.ended)
        left -= sum(present.values())
        return (time.monotonic() - self.began) / done * left

    def show(self, active: Sequence[Config]) -> None:
        """Bring the display's last line up to date."""
        if self.task is not None:
            self.task.done, self.task.total = len(self.ended), len(self.steps)
            self.task.left, self.task.since = self.seconds_left(active), time.monotonic()


def _step(run: Config) -> int:
    """Updates that a run has logged so far."""
    line = _last_training_line(Path(run.output_dir) / "metrics.jsonl")
    return 0 if line is None else min(int(line["step"]), run.training.steps)


@contextmanager
def _display(parallel: int, whole: StudyProgress) -> Iterator[Display]:
    """Bars and a line about the whole, unless the one run draws its own."""
    with Display(console, disable=parallel == 1) as display:
        if parallel > 1:
            whole.task = display.whole = Task("all runs", len(whole.steps))
        yield display


@contextmanager
def _signals_passed_on(active: list[_Process]) -> Iterator[list[int]]:
    """Note a signal's exit code instead of dying before the runs, which save themselves.

    All are passed on as SIGTERM: the terminal sends Ctrl-C to the runs too, and a second
    SIGINT would end them unsaved.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(128 + number)
        for process in active:
            process.popen.terminate()

    before = {n: signal.signal(n, note) for n in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
