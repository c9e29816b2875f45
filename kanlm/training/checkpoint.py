"""Checkpoints: all that exact resumption needs, in safetensors and JSON.

A folder `checkpoints/step-00000500/` appears whole or not at all: it is written under
another name, flushed to disk and renamed, and only then does the file `latest` name it.
Nothing in it can run code when it is read, and nothing is read that its index does not
vouch for: where a file is damaged, the checkpoint before takes its place.

    model.safetensors      weights and persistent buffers, grids among them
    optimizer.safetensors  the optimizer's moments, by parameter name
    random-R.safetensors   random-number states of rank R
    state.json             step, counters, and what the loop must remember
    index.json             size and SHA-256 of each of these, written last
"""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kanlm.errors import UserError, first_line
from kanlm.faults import point
from kanlm.files import cannot_write, discard, replacing, sweep, write_text
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.training.seal import damage, seal


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    random_states: list[dict[str, torch.Tensor]],
    state: dict[str, Any],
    keep: int,
    best_step: int | None = None,
) -> Path:
    """Write `folder/step-N` atomically, move `latest` to it and delete what is not kept.

    Arguments:
        keep: how many of the newest are kept.
        best_step: of a checkpoint that is kept besides.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    target = _place(folder, step)
    point("before-checkpoint-write")
    with replacing(target) as draft:
        save_file(weights(model), draft / "model.safetensors")
        point("inside-checkpoint-write")
        save_file(_optimizer_tensors(model, optimizer), draft / "optimizer.safetensors")
        point("inside-checkpoint-write")
        for rank, tensors in enumerate(random_states):
            save_file(tensors, draft / f"random-{rank}.safetensors")
        (draft / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
        point("inside-checkpoint-write")
        seal(draft)
        point("before-checkpoint-move")
    point("after-write-before-latest")
    write_text(folder / "latest", target.name)
    _prune(folder, step, keep, best_step)
    return target


def _place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


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

    Raises:
        UserError: a file cannot be read, or the weights are of another architecture.
    """
    load_weights(model, checkpoint / "model.safetensors")
    path = checkpoint / "optimizer.safetensors"
    tensors = _read(path)
    for name, parameter in model.named_parameters():
        moments = {
            key.rpartition(":")[2]: tensors.pop(key)
            for key in list(tensors)
            if key.rpartition(":")[0] == name
        }
        for key, value in moments.items():
            if value.ndim and value.shape != parameter.shape:
                raise UserError(
                    f"{path} is of another architecture: {name}:{key} is {tuple(value.shape)} "
                    f"there, for a parameter that is {tuple(parameter.shape)} in this model"
                )
        optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in moments.items()}
    if tensors:
        raise UserError(f"{path} is of another architecture: {min(tensors)} is of no parameter")
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


def load_random_state(checkpoint: Path, rank: int) -> None:
    """Put the random-number generators of a rank's process into place.

    Raises:
        UserError: the checkpoint was written by fewer processes, or holds something else.
    """
    path = checkpoint / f"random-{rank}.safetensors"
    if not path.exists():
        raise UserError(f"{path} is missing: the run was started with fewer processes")
    state = _read(path)
    try:
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} holds no random state: {first_line(error)}") from None


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, a tied one once."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach().contiguous()
    return tensors


def load_weights(model: nn.Module, path: Path) -> None:
    """Copy a safetensors file into the model, which it must fit exactly.

    Raises:
        UserError: naming the first tensor that is missing, left over or of another shape.
    """
    tensors = _read(path)
    own = weights(model)
    for name in dict.fromkeys([*own, *tensors]):
        ours, theirs = own.get(name), tensors.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            shapes = [tuple(t.shape) if t is not None else "absent" for t in (theirs, ours)]
            raise UserError(
                f"{path} is of another architecture: {name} is {shapes[0]} there and "
                f"{shapes[1]} in this model"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def model_folder(run: Path) -> Path:
    """Where a finished run keeps its model and tokenizer.

    Raises:
        UserError: the run is not finished.
    """
    if not (run / "model").exists():
        raise UserError(f"{run} has no model/ yet: finish that run first")
    return run / "model"


def load_trained(run: Path, **settings: Any) -> KanLMForCausalLM:
    """The model in a finished run's `model/`, with other `settings` such as dropout.

    Raises:
        UserError: the run is not finished, or its weights are not those of its model.
    """
    place = model_folder(run)
    try:
        kind = json.loads((place / "config.json").read_text()).get("model_type")
        if kind != KanLMConfig.model_type:
            raise UserError(f"{place} is of another architecture: model_type is {kind}")
        model = KanLMForCausalLM(KanLMConfig.from_pretrained(place, **settings))
    except (OSError, ValueError) as error:
        raise UserError(f"{place / 'config.json'} cannot be read: {error}") from None
    load_weights(model, place / "model.safetensors")
    return model


def load_tokenizer(run: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a finished run's `model/`; code that lies there is not run.

    Raises:
        UserError: the run is not finished, or its tokenizer cannot be read.
    """
    place = model_folder(run)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            place, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # What tokenizers raises is a bare Exception.
        raise UserError(f"{place}: the tokenizer cannot be read: {first_line(error)}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{place}: the tokenizer has no fast version (tokenizer.json)")
    return tokenizer


def _optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    return {
        f"{name}:{key}": value.contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
