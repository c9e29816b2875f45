"""Checkpoints: all that exact resumption needs, in safetensors and JSON.

A folder `checkpoints/step-00000500/` appears whole or not at all: it is written under
another name, flushed to disk and renamed, and only then does the file `latest` name it.
Nothing in it can run code when it is read, and nothing is read that its index does not
vouch for: where a file is damaged, the checkpoint before takes its place.

    model*.safetensors, optimizer*.safetensors, shards.json
                           what `stored` says: whole, or each process's part
    random-R.safetensors   random-number states of rank R
    state.json             step, counters, and what the loop must remember
    index.json             size and SHA-256 of each of these, written last
"""

import itertools
import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from kanlm.errors import UserError, first_line
from kanlm.faults import point
from kanlm.files import cannot_write, discard, flush, replacing, said_of, sweep, write_text
from kanlm.training.processes import in_all, on_main
from kanlm.training.seal import Facts, damage, facts, seal
from kanlm.training.stored import (
    Index,
    load_moments,
    load_weights,
    write_index,
    write_own_part,
)


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
    best_step: int | None = None,
) -> Path:
    """Write `folder/step-N` atomically, move `latest` to it and delete what is not kept.

    All processes call it at once, and see the same folder.

    Arguments:
        model: whole, or shared, with the parts where they belong (`reshard`).
        state: as of the main process.
        keep: how many of the newest are kept.
        best_step: of a checkpoint that is kept besides.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    target, rank = _place(folder, step), accelerator.process_index

    def write() -> tuple[Index, dict[str, Facts]]:
        with said_of(target):
            layouts, files = write_own_part(draft, model, optimizer, rank)
            files.append(_random_file(draft, rank))
            save_file(random_state(), files[-1])
            for file in files:
                flush(file)
            return layouts, {file.name: facts(file) for file in files}

    def finish(written: list[tuple[Index, dict[str, Facts]]]) -> None:
        with said_of(target):
            write_index(draft, [layouts for layouts, _ in written])
            (draft / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
            point("inside-checkpoint-write")
            seal(draft, {name: known for _, files in written for name, known in files.items()})
            point("before-checkpoint-move")

    def publish() -> None:
        point("after-write-before-latest")
        write_text(folder / "latest", target.name)
        _prune(folder, step, keep, best_step)

    point("before-checkpoint-write")
    with ExitStack() as stack:
        # The main process holds the draft, and moves it into place when the stack closes.
        draft = on_main(accelerator, lambda: stack.enter_context(replacing(target)))
        written = in_all(accelerator, write)
        on_main(accelerator, lambda: finish(written))
        on_main(accelerator, stack.close)
    on_main(accelerator, publish)
    return target


def _place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _random_file(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f"random-{rank}.safetensors"


def _steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, the newest first."""
    found = (re.fullmatch(r"step-(\d{8,})", path.name) for path in folder.glob("step-*"))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def _prune(folder: Path, step: int, keep: int, best_step: int | None) -> None:
    """Delete checkpoints older than the `keep` newest up to `step`, the best excepted."""
    old = itertools.islice((s for s in _steps(folder) if s <= step), keep, None)
    try:
        for doomed in old:
            if doomed != best_step:
                discard(_place(folder, doomed))
        sweep(folder)
    except OSError as error:
        raise cannot_write(folder, error) from None


def checkpoint_to_resume(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The checkpoint that `latest` names, or, where it is damaged, the newest intact one.

    Arguments:
        report: takes a line on a damaged checkpoint that is passed over.

    Returns:
        None where no checkpoint was ever finished.

    Raises:
        UserError: there are checkpoints, and none is intact.
    """
    places = [_place(folder, step) for step in _steps(folder)]
    pointer, problems = folder / "latest", []
    if pointer.exists():
        name = pointer.read_text(errors="replace").strip()
        if folder / name in places:
            places = sorted(places, key=lambda place: place.name != name)
        else:
            problems.append(f"{pointer} names {name!r}, which is no checkpoint there")
    for place in places:
        problem = damage(place)
        if problem is None:
            if problems:
                report(f"{problems[0]}; going on from {place.name}")
            return place
        problems.append(f"{place} is damaged: {problem}")
    if problems:
        others = f", and no other is intact of {len(places)}" if len(places) > 1 else ""
        raise UserError(f"{problems[0]}{others}; delete {folder} to start from the beginning")
    return None


def best_checkpoint(folder: Path, step: int) -> Path:
    """The checkpoint of a step, known to be intact.

    Raises:
        UserError: it is damaged.
    """
    place = _place(folder, step)
    problem = damage(place)
    if problem is not None:
        raise UserError(f"{place} is damaged: {problem}; it holds the best model")
    return place


def checkpoint_step(checkpoint: Path) -> int:
    """Updates done when the checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def load_checkpoint(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put weights and moments into place and return the contents of state.json.

    Arguments:
        model, optimizer: whole, or shared by any number of processes.

    Raises:
        UserError: a file cannot be read, or the weights are of another architecture.
    """
    load_weights(model, checkpoint)
    load_moments(model, optimizer, checkpoint)
    return read_state(checkpoint)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The contents of state.json.

    Raises:
        UserError: it is not a JSON object.
    """
    path = checkpoint / "state.json"
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} cannot be read: it holds no object")
    return state


def random_state() -> dict[str, torch.Tensor]:
    """States of this process's random-number generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def processes(checkpoint: Path) -> int:
    """How many processes wrote the checkpoint."""
    return len(list(checkpoint.glob("random-*.safetensors")))


def load_random_state(checkpoint: Path, rank: int) -> None:
    """Put the random-number generators of a rank's process into place.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    path = _random_file(checkpoint, rank)
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    try:
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} holds no random state: {first_line(error)}") from None
