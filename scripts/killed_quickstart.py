"""Does the quickstart's model, shared by two processes and killed twice, end as in one process?

The KAN arm of configs/quickstart.yaml is pretrained by one process in peace. Then two processes
start it with `training.sharding=full`; at a third and at two thirds of its steps all are killed,
and the same command goes on. What is compared is bits per byte over the test split.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kanlm.config import load

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "quickstart.yaml"
#: Largest difference that is allowed.
BITS_PER_BYTE = 0.005


@dataclass(frozen=True)
class Outcome:
    """Bits per byte on the test split, and what the kills cost."""

    undisturbed: float
    killed: float
    kills: int
    lost_steps: list[int]

    @property
    def passed(self) -> bool:
        """Whether the difference is small enough."""
        return abs(self.killed - self.undisturbed) <= BITS_PER_BYTE


def compare(folder: Path, overrides: list[str]) -> Outcome:
    """Run both, in folders of their own in `folder`.

    Args:
        overrides: of settings, for both.
    """
    steps = load(CONFIG, overrides).training.steps
    alone = _start(folder / "alone", 1, overrides)
    if alone.wait():
        raise RuntimeError(f"{folder / 'alone'}: exit code {alone.returncode}")
    shared = folder / "shared"
    lost = [_kill_at(shared, share * steps // 3, overrides) for share in (1, 2)]
    last = _start(shared, 2, overrides)
    if last.wait():
        raise RuntimeError(f"{shared}: exit code {last.returncode}")
    before, after = (_bits_per_byte(run) for run in (folder / "alone", shared))
    return Outcome(before, after, len(lost), lost)


def _start(run: Path, processes: int, overrides: list[str]) -> subprocess.Popen[bytes]:
    """Start pretraining in a session of its own, so that all of it can be killed at once."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    sharding = ["training.sharding=full"] if processes > 1 else []
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "kanlm", "pretrain"]
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    return subprocess.Popen(
        [*command, str(CONFIG), f"output_dir={run}", *sharding, *overrides],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"},
        cwd=ROOT,
        start_new_session=True,
    )


def _kill_at(run: Path, step: int, overrides: list[str]) -> int:
    """Kill all processes after a step, and return the steps that go with them."""
    started = _start(run, 2, overrides)
    while (reached := _last_step(run)) < step:
        if started.poll() is not None:
            raise RuntimeError(f"{run}: exit code {started.returncode} before step {step}")
        time.sleep(0.05)
    # The launcher, and by its group the processes that it started.
    for pid in [*_children(started.pid), started.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    started.wait()
    saved = int((run / "checkpoints" / "latest").read_text().removeprefix("step-"))
    return max(0, reached - saved)


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _last_step(run: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
        return max((json.loads(line)["step"] for line in lines), default=0)
    return 0


def _bits_per_byte(run: Path) -> float:
    results: dict[str, Any] = json.loads((run / "results.json").read_text())
    (record,) = results["records"]
    return record["nats"] / record["bytes"] / math.log(2)
