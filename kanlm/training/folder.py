"""The run's folder: whose it is, and whether it is new, unfinished or finished.

A folder belongs to one configuration. Starting the same one again resumes it; starting
another there is refused, because two runs mixed in one folder prove nothing.
"""

import itertools
from pathlib import Path
from typing import Any

from kanlm.config import (
    Config,
    from_tree,
    leaves,
    lies_in,
    merge,
    parse_override,
    read_tree,
    to_tree,
    to_yaml,
)
from kanlm.errors import UserError
from kanlm.files import write_text

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

_RUN, _STUDY = "a single run", "a study"


def claim(folder: Path, config: Config, *, study: bool = False) -> None:
    """Check that `folder` is empty, absent, or holds a run, or a study, of this very `config`.

    `output_dir` may differ, so that a run can be moved, and so may the time limit, what
    processes share, how checkpoints are written, and `study`: it may get more arms, seeds or
    trials, for each of its runs is claimed by itself.

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
    different = first_difference(read_config_tree(folder), to_tree(config))
    if different is not None:
        name, theirs, ours = different
        raise UserError(
            f"output_dir = {folder} holds a run with {name} = {theirs}, not {ours}; "
            "choose another output_dir, or delete that folder"
        )


def _used(folder: Path) -> bool:
    """Whether a folder holds more than what a job leaves that dies as it begins."""
    return any(path.name not in (".lock", ".config.yaml.draft") for path in folder.iterdir())


def _contents(folder: Path) -> str | None:
    """What has begun in a folder, in words, or None if only its config.yaml says anything."""
    if (folder / "metrics.jsonl").exists():
        return _RUN
    runs = itertools.chain(folder.glob("*/seed-*"), folder.glob("*/trials"))
    return None if next(runs, None) is None else _STUDY


def write_config(folder: Path, config: Config) -> None:
    """Write config.yaml, every setting stated."""
    write_text(folder / "config.yaml", to_yaml(config))


def read_config_tree(folder: Path) -> dict[str, Any]:
    """The nested dictionary in a run's config.yaml.

    Raises:
        UserError: the folder holds none.
    """
    if not (folder / "config.yaml").exists():
        raise UserError(f"{folder} is no run folder: it holds no config.yaml")
    return read_tree(folder / "config.yaml", [])


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
        "let that run go on"
    )


def is_finished(folder: Path) -> bool:
    """Whether the run's results have been written, which happens last."""
    return (folder / "results.json").exists()


def first_difference(
    theirs: dict[str, Any], ours: dict[str, Any], prefix: str = ""
) -> tuple[str, Any, Any] | None:
    """The dotted name and both values of the first setting that differs, or None."""
    for key in [*theirs, *(key for key in ours if key not in theirs)]:
        name, a, b = f"{prefix}{key}", theirs.get(key), ours.get(key)
        if name in _FREE or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            deeper = first_difference(a, b, f"{name}.")
            if deeper is not None:
                return deeper
        else:
            return name, a, b
    return None


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
