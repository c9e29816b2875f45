"""Does a run end with the numbers it would have had if nothing had happened to it?

A tiny run, with grids that refine and move, dropout, checkpoints every few steps and a best
one, is brought to its end once in peace: by one process, by two, and by two that share the
model. Then it is started again and again in new folders, something is done to it, and the
same command goes on until it is done:

- SIGKILL at random instants, to all its processes or to one;
- SIGKILL at each of `kanlm.faults.POINTS`, by each process that comes by;
- a file of its newest checkpoint truncated or one bit of it flipped, each file in turn;
- each signal that it answers by saving itself, and a time limit.

In the end the weights must be those of the peaceful run bit for bit, and its log the same
line for line but for the times. Processes are forked from this one, so that none spends its
life importing libraries; two of them meet over gloo as under torchrun. Last comes a larger
run, that of `killed_quickstart`, which is compared with one of another number of processes.
"""

import argparse
import contextlib
import gc
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Before torch is imported: it must have started no threads when this process forks.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["GLOO_SOCKET_IFNAME"] = "lo"

import killed_quickstart

from kanlm import faults
from kanlm.cli import main as kanlm
from kanlm.config import from_tree, to_yaml
from kanlm.experiments import single
from kanlm.training.resolve import resolve

#: Steps of the run.
STEPS = 24
#: Seconds in which the other process must end after one was killed.
PATIENCE = 30.0
#: Points passed once in a run, so that each time is another run's first.
PASSED_ONCE = (
    "inside-preparation",
    "before-config",
    "inside-resume",
    "inside-log-rewrite",
    "after-training",
    "before-results",
)
#: Points that only the main process passes.
MAIN_ONLY = (
    "inside-preparation",
    "before-checkpoint-move",
    "after-write-before-latest",
    "inside-pruning",
    "inside-log-rewrite",
    "before-results",
)
#: Points of a run that finds no shards prepared.
UNPREPARED = ("inside-preparation",)
#: What a run must have gone through before it passes a point.
AFTER_A_KILL = ("inside-resume", "inside-log-rewrite")


@dataclass(frozen=True)
class Layout:
    """How many processes there are, and what they share."""

    processes: int
    sharding: str = "none"

    def __str__(self) -> str:
        return f"{self.processes}{', FSDP2' if self.sharding != 'none' else ''}"


LAYOUTS = {"one": Layout(1), "two": Layout(2), "shared": Layout(2, "full")}


@dataclass
class Row:
    """One fault, and what came of it each time."""

    fault: str
    layout: Layout
    injected: int = 0
    identical: int = 0
    #: Done after the last checkpoint, and so once more.
    lost_steps: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        """In words."""
        if self.identical == self.injected and not self.failures:
            return "same weights and log"
        return f"{self.injected - self.identical} differ: {'; '.join(self.failures)}"


class Attempt:
    """The processes of one start of a run."""

    def __init__(self, config: Path, processes: int, faults_by_rank: dict[int, str]) -> None:
        port = str(_free_port())
        self.log = config.with_suffix(".log")
        self.pids = [
            _fork(config, self.log, rank, processes, port, faults_by_rank.get(rank))
            for rank in range(processes)
        ]
        self.started = time.monotonic()
        self.codes: dict[int, int] = {}

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until all have ended, at most so long; whether they have."""
        while len(self.codes) < len(self.pids):
            for pid in self.pids:
                if pid not in self.codes:
                    found, status = os.waitpid(pid, os.WNOHANG)
                    if found:
                        self.codes[pid] = os.waitstatus_to_exitcode(status)
            if seconds is not None and time.monotonic() - self.started > seconds:
                return len(self.codes) == len(self.pids)
            if self.killed and not self._seen_off():
                return False
            time.sleep(0.002)
        return True

    @property
    def killed(self) -> bool:
        """Whether one of them was killed."""
        return -signal.SIGKILL in self.codes.values()

    def _seen_off(self) -> bool:
        """Ask the others to go, as torchrun does; whether it is not yet time to lose patience."""
        if not hasattr(self, "first_death"):
            self.first_death = time.monotonic()
            self.send(signal.SIGTERM, range(len(self.pids)))
        return time.monotonic() - self.first_death < PATIENCE

    def send(self, number: int, ranks: Sequence[int]) -> None:
        """Send a signal to some that are still there."""
        for rank in ranks:
            if self.pids[rank] not in self.codes:
                os.kill(self.pids[rank], number)

    @property
    def exit_codes(self) -> list[int]:
        """By rank."""
        return [self.codes[pid] for pid in self.pids]


class Chaos:
    """The peaceful runs, and what is done to others.

    Args:
        folder: for all that is written.
        draw: random numbers.
    """

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self.folder, self.draw = folder, draw
        self.count = 0
        self.rows: list[Row] = []
        self.expected: dict[Layout, tuple[bytes, list[dict[str, Any]]]] = {}
        self.seconds: dict[Layout, float] = {}
        #: Of a checkpoint.
        self.files: dict[Layout, list[str]] = {}
        self.slowest_farewell = 0.0
        text = random.Random(0)
        words = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "her", "house"]
        lines = (" ".join(text.choices(words, k=30)) for _ in range(80))
        (folder / "words.txt").write_text("\n\n".join(lines))

    def peace(self, layout: Layout) -> None:
        """Bring the run to its end undisturbed."""
        config, run = self._new_run(layout)
        attempt = Attempt(config, layout.processes, {})
        attempt.wait()
        if any(attempt.exit_codes):
            sys.exit(f"the undisturbed run failed:\n{attempt.log.read_text()[-3000:]}")
        self.seconds[layout] = time.monotonic() - attempt.started
        self.expected[layout] = _results(run)
        newest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
        self.files[layout] = sorted(path.name for path in newest.iterdir())

    def at_random(self, layout: Layout, times: int) -> None:
        """SIGKILL at an instant anywhere in the life of a run, to all or to one process."""
        processes = layout.processes
        for victims in [list(range(processes)), *([[0], [1]] if processes > 1 else [])]:
            everyone = len(victims) == processes
            name = "a random instant" + ("" if everyone else f", process {victims[0]} alone")
            row = self._row(name, layout)
            for _ in range(times if processes == 1 or everyone else -(-times // 4)):
                self._try(row, lambda config, run, v=victims: self._kill(config, run, layout, v))

    def at_points(self, layout: Layout, times: int, names: Sequence[str]) -> None:
        """SIGKILL at each point, at its first visits or in several runs, by each process."""
        processes = layout.processes
        for name in names:
            for rank in range(1 if name in MAIN_ONLY else processes):
                at = f"{name}, process {rank}" if processes > 1 else name
                row = self._row(at, layout)
                for visit in range(1, times + 1):
                    fault = f"{name}:{1 if name in PASSED_ONCE else visit}"
                    self._try(
                        row,
                        lambda config, run, n=name, r=rank, f=fault: self._kill_at(
                            config, run, processes, n, r, f
                        ),
                    )

    def by_damage(self, layout: Layout) -> None:
        """Each file of the newest checkpoint truncated, and a bit of it flipped."""
        for kind in ("truncated", "with a flipped bit", "gone"):
            row = self._row(f"a checkpoint's file {kind}, each in turn", layout)
            for file in [*self.files[layout], "latest"]:
                self._try(
                    row,
                    lambda config, run, k=kind, f=file: self._damage(
                        config, run, layout.processes, k, f
                    ),
                )

    def by_signal(self, layout: Layout) -> None:
        """Signals, and a time limit, after which the run saves itself and says so."""
        processes = layout.processes
        for number, code in [
            (signal.SIGTERM, 143),
            (signal.SIGINT, 130),
            (signal.SIGUSR1, 128 + signal.SIGUSR1),
            (None, 75),
        ]:
            name = signal.Signals(number).name if number else "the time limit"
            row = self._row(f"{name}, exit code {code}", layout)
            for rank in range(processes if number else 1):
                self._try(
                    row,
                    lambda config, run, n=number, c=code, r=rank: self._stop(
                        config, run, processes, n, c, r
                    ),
                )

    # What is done to one run; each returns whether it was done, and the steps lost.

    def _kill(self, config: Path, run: Path, layout: Layout, victims: list[int]) -> int | None:
        attempt = Attempt(config, layout.processes, {})
        attempt.wait(self.draw.uniform(0, self.seconds[layout]))
        attempt.send(signal.SIGKILL, victims)
        self._see_off(attempt)
        return _lost_steps(run) if attempt.killed else None

    def _kill_at(
        self, config: Path, run: Path, processes: int, name: str, rank: int, fault: str
    ) -> int | None:
        if name in UNPREPARED:
            shared, own = self.folder / "cache", self.folder / f"cache-{run.name}"
            config.write_text(config.read_text().replace(str(shared), str(own)))
        if name in AFTER_A_KILL:
            first = Attempt(config, processes, {0: f"between-optimizer-and-log:{STEPS // 2}"})
            self._see_off(first)
        attempt = Attempt(config, processes, {rank: fault})
        self._see_off(attempt)
        return _lost_steps(run) if attempt.killed else None

    def _damage(self, config: Path, run: Path, processes: int, kind: str, file: str) -> int | None:
        last = STEPS - 5
        attempt = Attempt(config, processes, {0: f"between-optimizer-and-log:{last}"})
        self._see_off(attempt)
        checkpoints = run / "checkpoints"
        newest = checkpoints / (checkpoints / "latest").read_text()
        path = checkpoints / "latest" if file == "latest" else newest / file
        content = bytearray(path.read_bytes())
        if kind == "gone":
            path.unlink()
        elif kind == "truncated":
            path.write_bytes(content[: self.draw.randrange(len(content))])
        else:
            content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
            path.write_bytes(content)
        return None if not attempt.killed else last - _resumable_step(run, newest, file)

    def _stop(
        self, config: Path, run: Path, processes: int, number: int | None, code: int, rank: int
    ) -> int | None:
        text = config.read_text()
        if number is None:
            # Over at the first look at the clock, then lifted, which changes no number.
            config.write_text(text.replace("time_limit_minutes: null", "time_limit_minutes: 1e-6"))
            attempt = Attempt(config, processes, {})
        else:
            attempt = Attempt(config, processes, {})
            # Before its first step it has nothing to save, and just ends.
            while not _last_step(run) and not attempt.wait(0):
                time.sleep(0.005)
            attempt.send(number, [rank])
        self._see_off(attempt)
        if number is None:
            config.write_text(text)
        if attempt.exit_codes != [code] * processes:
            raise AssertionError(f"exit codes {attempt.exit_codes}, not {code}")
        if attempt.log.read_text().count("stopped and saved") != 1:
            raise AssertionError("it was not said once that it is saved")
        return _lost_steps(run)

    # Bookkeeping

    def _row(self, fault: str, layout: Layout) -> Row:
        self.rows.append(Row(fault, layout))
        return self.rows[-1]

    def _try(self, row: Row, disturb: Callable[[Path, Path], int | None]) -> None:
        """Disturb a new run, let it go on to its end, and compare."""
        config, run = self._new_run(row.layout)
        try:
            lost = disturb(config, run)
            if lost is None:
                if row.fault.startswith("a random instant"):
                    # It came after the run's end: not every instant is one of its life.
                    lost = 0
                else:
                    raise AssertionError("the fault never came")
            row.injected += 1
            row.lost_steps.append(lost)
            attempt = Attempt(config, row.layout.processes, {})
            if not attempt.wait(20 * self.seconds[row.layout] + PATIENCE):
                raise AssertionError("the resumed run did not end")
            if any(attempt.exit_codes):
                text = attempt.log.read_text().strip().splitlines()
                raise AssertionError(f"exit codes {attempt.exit_codes}: {text[-1]}")
            weights, lines = _results(run)
            wanted_weights, wanted_lines = self.expected[row.layout]
            if weights != wanted_weights:
                raise AssertionError("other weights")
            if lines != wanted_lines:
                raise AssertionError("another log")
            row.identical += 1
        except AssertionError as error:
            row.failures.append(f"{error} ({run.name})")
        else:
            shutil.rmtree(run)
        print(f"{row.fault}, processes {row.layout}: {row.identical}/{row.injected}", flush=True)

    def _see_off(self, attempt: Attempt) -> None:
        """Wait for the end of all processes of a run of which one was killed, or fails."""
        ended = attempt.wait()
        if attempt.killed and hasattr(attempt, "first_death"):
            self.slowest_farewell = max(
                self.slowest_farewell, time.monotonic() - attempt.first_death
            )
        if not ended:
            attempt.send(signal.SIGKILL, range(len(attempt.pids)))
            attempt.wait()
            raise AssertionError("a process outlived another that was killed")

    def _new_run(self, layout: Layout) -> tuple[Path, Path]:
        self.count += 1
        run = self.folder / f"run-{self.count}"
        config = self.folder / f"run-{self.count}.yaml"
        tree = _tree(self.folder, run, layout.sharding)
        config.write_text(to_yaml(resolve(from_tree(tree))))
        return config, run


def _tree(folder: Path, run: Path, sharding: str) -> dict[str, Any]:
    splines = {"kind": "kan-local", "basis": {"kind": "bspline", "degree": 1}}
    return {
        "output_dir": str(run),
        "data": {
            "domain": "words",
            "cache_dir": str(folder / "cache"),
            "sources": [{"kind": "files", "path": str(folder / "words.txt"), "separator": "\n\n"}],
            "validation_fraction": 0.1,
            "test_fraction": 0.1,
        },
        "tokenizer": {"kind": "bytes"},
        "model": {
            "d_model": 8,
            "n_layers": 1,
            "n_heads": 1,
            "context_length": 16,
            "dropout": 0.1,
            "feed_forward": splines,
        },
        "training": {
            "steps": STEPS,
            "batch_size": 4,
            "log_every": 1,
            "evaluate_every": 8,
            "checkpoint_every": 3,
            "keep_best_checkpoint": True,
            "compile": "off",
            "sharding": sharding,
            "background_checkpoints": "on",
            "grid_schedule": {0: 2, 7: 4},
            "grid_adaptation_steps": [4, 10],
        },
        "schedule": {"warmup_steps": 2},
        "evaluation": {"bootstrap_resamples": 10, "batch_size": 256},
        "generation": {"max_new_tokens": 2},
        "tracking": {"wandb": "disabled"},
    }


def _fork(config: Path, log: Path, rank: int, processes: int, port: str, fault: str | None) -> int:
    """Start `kanlm pretrain` as torchrun does, in a copy of this process."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        environment = {"KANLM_FAULT": fault} if fault else {}
        if processes > 1:
            environment |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
        os.environ.update(environment)
        # The page is no part of what is tested, and takes longer to draw than the run.
        single.write_report = lambda folder: None
        try:
            kanlm(["pretrain", str(config)])
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def _results(run: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """The weights, and the lines of the log without times."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return (run / "model" / "model.safetensors").read_bytes(), [
        {name: value for name, value in line.items() if "second" not in name} for line in lines
    ]


def _last_step(run: Path) -> int:
    """Of the log's last whole line, 0 if there is none."""
    with contextlib.suppress(FileNotFoundError):
        lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
        return max((json.loads(line)["step"] for line in lines), default=0)
    return 0


def _saved_step(run: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return int((run / "checkpoints" / "latest").read_text().removeprefix("step-"))
    return 0


def _lost_steps(run: Path) -> int:
    return max(0, _last_step(run) - _saved_step(run))


def _resumable_step(run: Path, newest: Path, file: str) -> int:
    """Of the newest checkpoint that was left alone."""
    steps = sorted(int(p.name.removeprefix("step-")) for p in newest.parent.glob("step-*"))
    return steps[-1] if file == "latest" else steps[-2]


def _quickstart_row(outcome: killed_quickstart.Outcome) -> str:
    lost = outcome.lost_steps
    return (
        f"| SIGKILL twice in a run of the quickstart's KAN | 2, FSDP2 | {outcome.kills} "
        f"| {outcome.killed:.4f} bits per byte, undisturbed in one process "
        f"{outcome.undisturbed:.4f} | {sum(lost) / len(lost):.1f} | {max(lost)} |"
    )


def table(chaos: Chaos, seconds: float, quickstart: killed_quickstart.Outcome | None = None) -> str:
    """What was done and what came of it, in Markdown."""
    rows = [
        f"| {row.fault} | {row.layout} | {row.injected} | {row.outcome} "
        f"| {sum(row.lost_steps) / max(1, row.injected):.1f} | {max(row.lost_steps, default=0)} |"
        for row in chaos.rows
    ]
    if quickstart is not None:
        rows.append(_quickstart_row(quickstart))
    total = sum(row.injected for row in chaos.rows)
    same = sum(row.identical for row in chaos.rows)
    points = "\n".join(f"- `{name}`: {text}." for name, text in faults.POINTS.items())
    return f"""# What a run survives

Written by `./scripts/chaos` at commit {_commit()} in {seconds / 60:.0f} minutes. A run of {STEPS}
steps, saved every 3, with grids that refine and move, is disturbed and started again. {total} times
in all; {same} ended with the weights of the run that nothing happened to, bit for bit, and with the
same log. Of two processes of which one was killed, the other ended within
{chaos.slowest_farewell:.1f} s. Steps are lost if they were done after the checkpoint from which the
run went on, and are done again.

| fault | processes | times | outcome | lost steps, mean | most |
|---|---|---|---|---|---|
{chr(10).join(rows)}

Named points are places where the process kills itself by SIGKILL:

{points}
"""


def _commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def main() -> None:
    """Do all of it, write what came of it, and exit with 1 if a run ended differently."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="at random instants (default 50)")
    parser.add_argument("--visits", type=int, default=3, help="kills at each point (default 3)")
    parser.add_argument("--points", nargs="*", default=list(faults.POINTS), help="default: all")
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=[*LAYOUTS])
    parser.add_argument("--no-damage", action="store_true", help="leave checkpoints alone")
    parser.add_argument("--no-signals", action="store_true", help="send no signals")
    parser.add_argument("--no-quickstart", action="store_true", help="leave out the large run")
    parser.add_argument("--seed", type=int, default=0, help="of the instants (default 0)")
    parser.add_argument("--output", type=Path, default=Path("scripts/chaos.md"))
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        chaos = Chaos(Path(folder), random.Random(options.seed))
        # What was imported is never garbage: collecting it takes half of a run's time.
        gc.freeze()
        layouts = [LAYOUTS[name] for name in options.layouts]
        # The first run makes the shards that all others read.
        for layout in (LAYOUTS["one"], *layouts):
            chaos.peace(layout)
        for layout in layouts:
            chaos.at_random(layout, options.kills)
            chaos.at_points(layout, options.visits, options.points)
            if not options.no_damage:
                chaos.by_damage(layout)
            if not options.no_signals:
                chaos.by_signal(layout)
        quickstart = None
        if not options.no_quickstart:
            quickstart = killed_quickstart.compare(Path(folder) / "quickstart", [])
        seconds = time.monotonic() - started
        options.output.write_text(table(chaos, seconds, quickstart))
        content = [{**asdict(row), "outcome": row.outcome} for row in chaos.rows]
        if quickstart is not None:
            content.append({"fault": "SIGKILL twice, quickstart", **asdict(quickstart)})
        options.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    failed = [row for row in chaos.rows if row.failures or row.identical != row.injected]
    for row in failed:
        print(f"{row.fault}, processes {row.layout}: {row.outcome}", file=sys.stderr)
    print(f"{options.output}: {sum(r.injected for r in chaos.rows)} faults in {seconds:.0f} s")
    sys.exit(1 if failed or (quickstart is not None and not quickstart.passed) else 0)


if __name__ == "__main__":
    main()
