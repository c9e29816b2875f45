"""The run's folder: whose it is, whether it is new, unfinished or finished, and its lock.

A folder belongs to one configuration. Starting the same one again resumes it; starting
another there is refused, because two runs mixed in one folder prove nothing. Only its length may
change, as far as `length` says so.

One job works in a folder at a time, however often it is started: the operating system gives the
lock back when the process dies, by whatever cause.
"""

import itertools
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kanlm.atomic_io import cannot_write, remove_folder, write_errors_as_user_errors, write_text
from kanlm.config import (
    Config,
    from_tree,
    leaves,
    lies_in,
    merge,
    parse_override,
    read_file,
    to_tree,
    to_yaml,
)
from kanlm.errors import UserError
from kanlm.training.length import study_around, why_not

#: What the verbs that take finished runs read of a run's settings.
READ_BY = {
    "evaluate": (
        "data",
        "model.context_length",
        "evaluation.split",
        "evaluation.stride",
        "evaluation.batch_size",
        "evaluation.bootstrap_resamples",
    ),
    # The text is the one given: its name, sources and folder are no settings any more.
    "evaluate --data": (
        "data.cache_dir",
        "data.validation_fraction",
        "data.test_fraction",
        "data.near_duplicate_threshold",
        "data.attention_within_documents",
        "model.context_length",
        "evaluation.split",
        "evaluation.stride",
        "evaluation.batch_size",
        "evaluation.bootstrap_resamples",
    ),
    "generate": ("generation", "seed"),
}

#: Settings that may differ from start to start, because no number depends on them beyond
#: rounding, as on the number of processes.
_FREE = (
    "output_dir",
    "study",
    "training.time_limit_minutes",
    "training.sharding",
    "training.background_checkpoints",
)

_LOCK = ".lock"
#: Seconds in which a lock is taken whose file a job deletes as it ends.
_LOCK_PATIENCE = 0.1

_RUN, _STUDY = "a single run", "a study"
_LENGTH = "training.steps"


def claim(folder: Path, config: Config, *, study: bool = False) -> None:
    """Check that `folder` is empty, absent, or holds a run, or a study, of this very `config`.

    `output_dir` may differ, so that a run can be moved, and so may the time limit, what
    sharding, how checkpoints are written, and `study`: it may get more arms, seeds or
    trials, for each of its runs is claimed by itself. A run by itself may get more or fewer
    steps where those that it has taken would have been the same.

    Raises:
        UserError: the folder holds a study where a run is to be, or a run where a study is,
            or naming the first setting that differs.
    """
    if not folder.exists() or (folder.is_dir() and not _used(folder)):
        return
    path = folder / "config.yaml"
    if not path.exists():
        raise UserError(f"output_dir = {folder} exists and holds no run; choose another")
    wanted = _STUDY if study else _RUN
    if _contents(folder) not in (wanted, None):
        # A file with a `study:` section makes both, whose results.json would be the same file.
        raise UserError(
            f"output_dir = {folder} holds {_contents(folder)}, where {wanted} is to be written; "
            "choose another output_dir"
        )
    _check_settings(folder, config, study=study)


def _check_settings(folder: Path, config: Config, *, study: bool) -> None:
    """Check that a folder's config.yaml is `config`, but for what may differ."""
    different = list(differences(read_config_tree(folder), to_tree(config)))
    length = next((each for each in different if each[0] == _LENGTH), None)
    others = [each for each in different if each[0] != _LENGTH]
    if length is not None and not others:
        reason = _why_not(folder, config, length[1], study=study)
        if reason is None:
            return
        raise UserError(
            f"output_dir = {folder} holds a run with {_LENGTH} = {length[1]}, which cannot become "
            f"{length[2]}: {reason}; choose another output_dir"
        )
    for name, theirs, ours in others:
        short = length is not None and not isinstance(theirs, list | dict)
        hint = f" (to change its length alone, give {name}={theirs})" if short else ""
        raise UserError(
            f"output_dir = {folder} holds a run with {name} = {theirs}, not {ours}{hint}; "
            "choose another output_dir, or delete that folder"
        )


def _why_not(folder: Path, config: Config, steps_before: int, *, study: bool) -> str | None:
    """Why a run or study cannot get the length in `config`, in words; None if it can."""
    around = folder if study else study_around(folder)
    if around is not None:
        return f"the runs of a study keep their length, and {around} is one"
    steps = checkpoint_steps(folder / "checkpoints")
    step = steps[0] if steps else 0
    return why_not(steps_before, config, step, finished=is_finished(folder))


def change_of_length(folder: Path, config: Config) -> str | None:
    """What becomes of a run's length, in a line; None if it stays as it was.

    `claim` has said that it may change.
    """
    before = _length_before(folder)
    if before in (None, config.training.steps):
        return None
    after, steps = config.training.steps, checkpoint_steps(folder / "checkpoints")
    done = f"resumes from step {steps[0]:,}" if steps else "starts from the beginning"
    word = "lengthened" if after > before else "shortened"
    return f"{folder}: {word} from {before:,} to {after:,} steps; {done}"


def stated_warmup(folder: Path) -> int | None:
    """Steps of warm-up that the run in a folder has; None without a run that can be read."""
    try:
        schedule = read_config_tree(folder).get("schedule")
    except UserError:
        return None
    steps = schedule.get("warmup_steps") if isinstance(schedule, dict) else None
    return steps if isinstance(steps, int) else None


def _length_before(folder: Path) -> Any:
    if not (folder / "config.yaml").exists():
        return None
    return read_config_tree(folder).get("training", {}).get("steps")


def _used(folder: Path) -> bool:
    """Whether a folder holds more than what a job leaves that dies as it begins."""
    return any(path.name not in (_LOCK, ".config.yaml.draft") for path in folder.iterdir())


def _contents(folder: Path) -> str | None:
    """What has begun in a folder, in words, or None if only its config.yaml says anything."""
    if (folder / "metrics.jsonl").exists():
        return _RUN
    runs = itertools.chain(folder.glob("*/seed-*"), folder.glob("*/trials"))
    return None if next(runs, None) is None else _STUDY


def write_config(folder: Path, config: Config) -> None:
    """Write config.yaml, every setting stated.

    Where that changes the run's length, what it had at its former end goes first, the results
    before all: in between the folder holds an unfinished run of the former length.
    """
    if change_of_length(folder, config) is not None:
        with write_errors_as_user_errors(folder):
            for name in ("results.json", "documents.jsonl", "report.html"):
                (folder / name).unlink(missing_ok=True)
            remove_folder(folder / "model")
    write_text(folder / "config.yaml", to_yaml(config))


def read_config_tree(folder: Path) -> dict[str, Any]:
    """The nested dictionary in a run's config.yaml.

    Raises:
        UserError: the folder holds none.
    """
    if not (folder / "config.yaml").exists():
        raise UserError(f"{folder} is no run folder: it holds no config.yaml")
    return read_file(folder / "config.yaml")


def check_weights(folder: Path) -> None:
    """Check that a run has weights to read: its `model/`, or a checkpoint before that.

    Raises:
        UserError: no run folder, or it stopped before its first checkpoint.
    """
    tree = read_config_tree(folder)
    if (folder / "model").exists() or next(folder.glob("checkpoints/step-*"), None) is not None:
        return
    training = from_tree(tree).training
    every = training.checkpoint_every
    first = "at its end" if every is None else f"after step {min(every, training.steps):,}"
    raise UserError(
        f"{folder} has no model/ yet and no checkpoint, of which the first comes {first}: "
        "resume that run first"
    )


def is_finished(folder: Path, config: Config | None = None) -> bool:
    """Whether the run's results have been written, which happens last.

    Args:
        config: if given, those of a run of its length.
    """
    if config is not None and change_of_length(folder, config) is not None:
        return False
    return (folder / "results.json").exists()


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, the newest first."""
    found = (re.fullmatch(r"step-(\d{8,})", path.name) for path in folder.glob("step-*"))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def first_difference(theirs: dict[str, Any], ours: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The dotted name and both values of the first setting that differs, or None."""
    return next(differences(theirs, ours), None)


def differences(
    theirs: dict[str, Any], ours: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """The dotted name and both values of each setting that differs, but for the free ones."""
    for key in [*theirs, *(key for key in ours if key not in theirs)]:
        name, a, b = f"{prefix}{key}", theirs.get(key), ours.get(key)
        if name in _FREE or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{name}.")
        else:
            yield name, a, b


def load_config(folder: Path, overrides: list[str], verb: str) -> Config:
    """A run's configuration with overrides of what `verb` reads of it laid on top.

    Raises:
        UserError: no run folder, or an override that is impossible or would go unread.
    """
    tree = read_config_tree(folder)
    parts = [parse_override(override) for override in overrides]
    for part in parts:
        tree = merge(tree, part)
    config = from_tree(tree)
    for override, part in zip(overrides, parts, strict=True):
        if not all(lies_in(name, READ_BY[verb]) for name, _ in leaves(part)):
            raise UserError(
                f"override '{override}': of a run's settings `kanlm {verb}` reads only "
                f"{', '.join(READ_BY[verb])}"
            )
    return config


def check_free(folder: Path) -> None:
    """Check that no job is at work in a folder, before anything is prepared for it.

    Raises:
        UserError: naming the job.
    """
    path = folder / _LOCK
    if path.exists():
        with _acquired(path, folder):
            pass


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other jobs out of a folder, which is made if it is not there and goes if it is empty.

    Raises:
        UserError: another job is at work there, or the folder cannot be written.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    path = folder / _LOCK
    try:
        with write_errors_as_user_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
        with _acquired(path, folder):
            with write_errors_as_user_errors(path):
                path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    finally:
        with suppress(OSError):
            for place in made:
                place.rmdir()


@contextmanager
def _acquired(path: Path, folder: Path) -> Iterator[None]:
    """Hold the lock.

    Raises:
        UserError: another job holds it, or its file cannot be written.
    """
    holder = ""
    # A soft lock would outlive a killed process.
    lock = FileLock(
        path, timeout=_LOCK_PATIENCE, poll_interval=_LOCK_PATIENCE / 10, fallback_to_soft=False
    )
    try:
        acquired = lock.acquire()
    except Timeout:
        with suppress(OSError):
            holder = path.read_text().strip()
        raise UserError(
            f"output_dir = {folder} is in use by {holder or 'another job'}; "
            "wait for it, or choose another output_dir"
        ) from None
    except OSError as error:
        raise cannot_write(path, error) from None
    with acquired:
        yield
