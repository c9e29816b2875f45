"""Named places at which a run can be made to die, so that its survival can be tested.

`KANLM_FAULT=NAME` kills the process with SIGKILL, as the kernel would when memory runs
out, where it first passes `NAME`; `KANLM_FAULT=NAME:3` where it passes it the third time.
`scripts/chaos` does this at every place and compares what the resumed run ends with.
Without the variable a place costs one look into the environment.
"""

import os
import signal
from collections import Counter

#: Name → what has been done there, and what has not.
POINTS = {
    "inside-preparation": "shards are written of which the preparation's progress does not tell",
    "before-config": "the folder is the run's, config.yaml is not written",
    "before-update": "gradients are there, the weights are still the old ones",
    "between-optimizer-and-log": "the weights are new, the log line is not written",
    "inside-grid-change": "the model has its new grids, the optimizer still the old ones",
    "before-checkpoint-write": "a checkpoint is due, nothing of it is written",
    "inside-checkpoint-write": "some files of a checkpoint are written",
    "before-checkpoint-move": "a checkpoint is complete under its draft's name",
    "after-write-before-latest": "a checkpoint is in place, `latest` names the one before",
    "inside-pruning": "an old checkpoint is out of the way, its files are not deleted",
    "inside-resume": "the weights are loaded, the random states are not",
    "inside-log-rewrite": "a resumed run has not yet cut off the log's last lines",
    "after-training": "all steps are done, model/ is not written",
    "before-results": "model/ is written, results.json is not",
}

_visits: Counter[str] = Counter()


def fault_point(name: str) -> None:
    """Die here if the environment says so."""
    wanted = os.environ.get("KANLM_FAULT")
    if wanted is None:
        return
    place, _, visit = wanted.partition(":")
    if place not in POINTS:
        raise RuntimeError(f"KANLM_FAULT = {wanted}: expected one of {', '.join(POINTS)}")
    if name == place:
        _visits[name] += 1
        if _visits[name] == int(visit or 1):
            os.kill(os.getpid(), signal.SIGKILL)
