"""`kanlm runs`: the runs and studies below a folder, from their small files alone.

Neither torch nor a checkpoint is read, and of metrics.jsonl only the end.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from kanlm.errors import UserError
from kanlm.training.run_folder import check_free, checkpoint_steps

#: Bytes at the end of metrics.jsonl among which the last log lines are looked for.
_TAIL = 2**17
#: Folders in which no run is looked for.
_SKIPPED = ("node_modules", "__pycache__", "cache", "wandb", "checkpoints", "model")


@dataclass(kw_only=True)
class Entry:
    """A run or a study.

    Attributes:
        state: `finished`, `running`, `stopped` or `damaged`.
        problem: what is damaged.
        step, steps: of a run, updates done and planned. Done are those that a stopped run
            resumes from, and that a running one has logged.
        runs, planned_runs: of a study, how many are finished, and how many there will be.
        arm: structure and basis of a finished run, kinds of feed-forward blocks of another; of a
            study, its arms.
        bits_per_byte: of the last log line of training.
        validation_bits_per_byte: of the last validation on the domain trained on.
        seconds: spent in training steps.
        changed: when something was last written, in local time.
    """

    path: str
    kind: str
    state: str
    problem: str | None = None
    step: int | None = None
    steps: int | None = None
    runs: int | None = None
    planned_runs: int | None = None
    arm: str = ""
    bits_per_byte: float | None = None
    validation_bits_per_byte: float | None = None
    seconds: float | None = None
    changed: str = ""

    def describe(self) -> str:
        """Describe the state in words."""
        if self.problem is not None:
            return f"damaged: {self.problem}"
        if self.kind == "study":
            done, planned = self.runs or 0, self.planned_runs or 0
            if self.state == "running":
                return f"running, run {min(done + 1, planned)} of {planned}"
            return (
                f"finished, {done} runs"
                if self.state == "finished"
                else (f"stopped after run {done} of {planned}")
            )
        if self.state == "finished":
            early = self.step is not None and self.steps is not None and self.step < self.steps
            return f"finished at step {self.step:,}" + (f" of {self.steps:,}" if early else "")
        return f"{self.state} at step {self.step or 0:,} of {self.steps or 0:,}"


class _DamagedError(Exception):
    """What is wrong with a run's files, in words."""


def list_runs(folder: Path) -> list[Entry]:
    """List the runs and studies below a folder, those last written first.

    The runs of a study are listed where the folder is the study or lies in it.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    entries = [_entry(place, tree) for place, tree in _found(folder, folder)]
    return sorted(entries, key=lambda entry: entry.changed, reverse=True)


def print_runs(folder: Path, *, as_json: bool) -> None:
    """Print a table of `list_runs`, or JSON.

    Raises:
        UserError: see `list_runs`.
    """
    entries = list_runs(folder)
    if as_json:
        print(json.dumps([asdict(entry) for entry in entries], indent=1))
        return
    if not entries:
        print(f"no runs below {folder}")
        return
    from kanlm.reporting.format import duration, fixed
    from kanlm.reporting.table import Table, print_table

    rows = [
        [
            entry.path,
            entry.arm,
            entry.describe(),
            fixed(entry.bits_per_byte),
            duration(entry.seconds) if entry.seconds is not None else "",
        ]
        for entry in entries
    ]
    print_table(
        Table(
            title=f"Runs below {folder}, the last written first",
            columns=["run", "arm", "state", "loss", "time"],
            rows=rows,
            note="Training loss of the last log line, in bits per byte, and time in training.",
        )
    )


def planned_runs(study: Mapping[str, Any]) -> int:
    """Count the runs that a study takes, by its settings: trials, then arms × seeds × stages."""
    arms = len(study["arms"])
    grid = next(iter(study.get("arm_grids", {}).values()), study.get("grid", {}))
    trials = math.prod(len(values) for values in grid.values())
    stages = 1 + len(study.get("stages", []))
    # The best trial stands for the run of the first seed.
    first = arms * (stages if trials == 1 else trials + stages - 1)
    finalists = min(study.get("finalists") or arms, arms)
    return first + finalists * (len(study.get("seeds", [0])) - 1) * stages


def _found(folder: Path, top: Path) -> Iterator[tuple[Path, Mapping[str, Any] | str]]:
    """Yield folders of runs and studies, with the settings of each or what is wrong with them."""
    if (folder / "config.yaml").is_file():
        try:
            tree: Mapping[str, Any] | str = _settings(folder)
        except _DamagedError as error:
            tree = str(error)
        if isinstance(tree, str) or tree.get("training"):
            yield folder, tree
            if isinstance(tree, str) or not _is_study(tree) or folder != top:
                return
    try:
        inner = sorted(os.scandir(folder), key=lambda item: item.name)
    except OSError:
        return
    for item in inner:
        skipped = item.name.startswith(".") or item.name in _SKIPPED
        if not skipped and item.is_dir(follow_symlinks=False):
            yield from _found(Path(item.path), top)


def _entry(folder: Path, tree: Mapping[str, Any] | str) -> Entry:
    changed = datetime.fromtimestamp(_changed(folder)).isoformat(timespec="seconds")
    entry = Entry(path=str(folder), kind="run", state="damaged", changed=changed)
    try:
        if isinstance(tree, str):
            raise _DamagedError(tree)
        if _is_study(tree):
            entry.kind = "study"
            _describe_study(entry, folder, tree)
        else:
            _describe_run(entry, folder, tree)
    except _DamagedError as error:
        entry.state, entry.problem = "damaged", str(error)
    except (KeyError, TypeError, AttributeError, ValueError):
        entry.state, entry.problem = "damaged", "its files do not hold what a run writes"
    return entry


def _describe_study(entry: Entry, folder: Path, tree: Mapping[str, Any]) -> None:
    study = tree["study"]
    entry.arm = ", ".join(study["arms"])
    entry.planned_runs = planned_runs(study)
    trials = list(folder.glob("*/trials/*"))
    runs = [*trials, *folder.glob("*/seed-*/stage-*")]
    done = [run for run in runs if (run / "results.json").exists()]
    # The best trial of an arm lies in two places.
    first = f"seed-{study.get('seeds', [0])[0]}"
    copies = [run for run in done if run.parent.name == first and run.name.startswith("stage-0-")]
    entry.runs = len(done) - (len(copies) if trials else 0)
    running = any(map(_is_running, (folder, *runs)))
    finished = (folder / "results.json").exists()
    entry.state = "running" if running else "finished" if finished else "stopped"


def _describe_run(entry: Entry, folder: Path, tree: Mapping[str, Any]) -> None:
    entry.steps = tree["training"]["steps"]
    entry.arm = _kinds(tree["model"]["feed_forward"])
    train, validation = _last_lines(folder / "metrics.jsonl", tree["data"]["domain"])
    entry.bits_per_byte = train.get("bits_per_byte")
    entry.seconds = train.get("seconds")
    entry.validation_bits_per_byte = validation.get("bits_per_byte")
    results = folder / "results.json"
    if _is_running(folder):
        entry.state, entry.step = "running", train.get("step", 0)
    elif results.exists():
        entry.state = "finished"
        ((entry.arm, facts),) = _read_json(results)["arms"].items()
        entry.step, entry.seconds = facts["steps"], facts["train_seconds"]
    else:
        steps = checkpoint_steps(folder / "checkpoints")
        entry.state, entry.step = "stopped", steps[0] if steps else 0


def _is_study(tree: Mapping[str, Any]) -> bool:
    return bool(tree.get("study"))


def _is_running(folder: Path) -> bool:
    try:
        check_free(folder)
    except UserError:
        return True
    return False


def _changed(folder: Path) -> float:
    times = [0.0]
    for name in ("config.yaml", "metrics.jsonl", "results.json", "checkpoints"):
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            continue
    return max(times)


def _settings(folder: Path) -> Mapping[str, Any]:
    """Read config.yaml without the checks of a run that is to be started."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        tree = yaml.load((folder / "config.yaml").read_bytes(), loader)
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        raise _DamagedError("config.yaml cannot be read") from None
    if not isinstance(tree, dict):
        raise _DamagedError("config.yaml holds no settings")
    return tree


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise _DamagedError(f"{path.name} cannot be read") from None
    if not isinstance(value, dict):
        raise _DamagedError(f"{path.name} holds no object")
    return value


def _last_lines(path: Path, domain: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the last lines of training and of validation on a domain; empty where there is none."""
    found: dict[str, dict[str, Any]] = {}
    for text in reversed(_tail(path)):
        try:
            line = json.loads(text)
            kind = line["kind"]
        except (ValueError, KeyError, TypeError):
            raise _DamagedError(f"{path.name} cannot be read") from None
        if kind == "train" or (kind == "validation" and line.get("domain") == domain):
            found.setdefault(kind, line)
        if len(found) == 2:
            break
    return found.get("train", {}), found.get("validation", {})


def _tail(path: Path) -> list[bytes]:
    """Read the whole lines at the end of a file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - _TAIL, 0))
            lines = file.read(_TAIL).split(b"\n")
    except FileNotFoundError:
        return []
    except OSError:
        raise _DamagedError(f"{path.name} cannot be read") from None
    # The last is not whole, nor is the first where the reading began within it.
    return lines[1 if size > _TAIL else 0 : -1]


def _kinds(feed_forward: Any) -> str:
    """List kinds of feed-forward blocks, each once."""
    specs = feed_forward if isinstance(feed_forward, list) else [feed_forward]
    kinds = [spec if isinstance(spec, str) else spec["kind"] for spec in specs]
    return " + ".join(dict.fromkeys(kinds))
