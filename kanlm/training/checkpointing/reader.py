"""Checkpoints: all that exact resumption needs, in safetensors and JSON.

A folder `checkpoints/step-00000500/` appears whole or not at all: it is written under
another name, flushed to disk and renamed, and only then does the file `latest` name it.
Nothing in it can run code when it is read, and nothing is read that its index does not
vouch for: where a file is damaged, the checkpoint before takes its place. `saving` writes
them.

    model*.safetensors, optimizer*.safetensors, shards.json
                           what `stored` says: whole, or each process's part
    random-R.safetensors   random-number states of rank R
    state.json             step, counters, and what the loop must remember
    index.json             size and SHA-256 of each of these, written last
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from kanlm.checksums import find_damage
from kanlm.errors import UserError, first_line
from kanlm.training.checkpointing.tensors import load_moments, load_weights
from kanlm.training.run_folder import checkpoint_steps


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / f"step-{step:08d}"


def random_file(checkpoint: Path, rank: int) -> Path:
    """Where the random states of a rank are."""
    return checkpoint / f"random-{rank}.safetensors"


def checkpoint_to_resume(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The checkpoint that `latest` names, or, where it is damaged, the newest intact one.

    Args:
        report: takes a line on a damaged checkpoint that is passed over.

    Returns:
        None where no checkpoint was ever finished.

    Raises:
        UserError: there are checkpoints, and none is intact.
    """
    places = [checkpoint_folder(folder, step) for step in checkpoint_steps(folder)]
    pointer, problems = folder / "latest", []
    if pointer.exists():
        name = pointer.read_text(errors="replace").strip()
        if folder / name in places:
            places = sorted(places, key=lambda place: place.name != name)
        else:
            problems.append(f"{pointer} names {name!r}, which is no checkpoint there")
    for place in places:
        problem = find_damage(place)
        if problem is None:
            if problems:
                report(f"{problems[0]}; resuming from {place.name}")
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
    place = checkpoint_folder(folder, step)
    problem = find_damage(place)
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

    Args:
        model, optimizer: whole, or sharded over any number of ranks.

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


def ranks_of(checkpoint: Path) -> int:
    """How many processes wrote the checkpoint."""
    return len(list(checkpoint.glob("random-*.safetensors")))


def load_random_state(checkpoint: Path, rank: int) -> None:
    """Put the random-number generators of a rank's process into place.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    path = random_file(checkpoint, rank)
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
