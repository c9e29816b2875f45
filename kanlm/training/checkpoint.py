"""Checkpoints: all that exact resumption needs, in safetensors and JSON.

A folder `checkpoints/step-00000500/` appears whole or not at all: it is written under
another name, flushed to disk and renamed, and only then does the file `latest` name it.
Nothing in it can run code when it is read.

    model.safetensors      weights and persistent buffers
    optimizer.safetensors  the optimizer's moments, by parameter name
    random-R.safetensors   random-number states of rank R
    state.json             step, counters, and what the loop must remember
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from kanlm.errors import UserError
from kanlm.files import replacing, write_text
from kanlm.model import KanLMConfig, KanLMForCausalLM


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    random_states: list[dict[str, torch.Tensor]],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write `folder/step-N` atomically, move `latest` to it and prune to `keep`.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    target = folder / f"step-{step:08d}"
    with replacing(target) as draft:
        save_file(weights(model), draft / "model.safetensors")
        save_file(_optimizer_tensors(model, optimizer), draft / "optimizer.safetensors")
        for rank, tensors in enumerate(random_states):
            save_file(tensors, draft / f"random-{rank}.safetensors")
        (draft / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
    write_text(folder / "latest", target.name)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        if old != target:
            shutil.rmtree(old)
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """The folder that `latest` names, or None where no checkpoint was finished."""
    pointer = folder / "latest"
    if not pointer.exists():
        return None
    found = folder / pointer.read_text().strip()
    if found.parent != folder or not (found / "state.json").exists():
        raise UserError(f"{pointer} names '{found.name}', which is no checkpoint in {folder}")
    return found


def checkpoint_step(checkpoint: Path) -> int:
    """Updates done when the checkpoint was written."""
    return json.loads((checkpoint / "state.json").read_text())["step"]


def load_checkpoint(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put weights and moments into place and return the contents of state.json.

    Raises:
        UserError: a file cannot be read, or the weights are of another architecture.
    """
    load_weights(model, checkpoint / "model.safetensors")
    tensors = _read(checkpoint / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        moments = {
            key.rpartition(":")[2]: value
            for key, value in tensors.items()
            if key.rpartition(":")[0] == name
        }
        optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in moments.items()}
    return json.loads((checkpoint / "state.json").read_text())


def random_state() -> dict[str, torch.Tensor]:
    """States of this process's random-number generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load_random_state(checkpoint: Path, rank: int) -> None:
    """Put the random-number generators of a rank's process into place.

    Raises:
        UserError: the checkpoint was written by fewer processes.
    """
    path = checkpoint / f"random-{rank}.safetensors"
    if not path.exists():
        raise UserError(f"{path} is missing: the run was started with fewer processes")
    state = _read(path)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, a tied one once."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach().contiguous()
    return tensors


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write `folder/model.safetensors`, replacing the folder atomically."""
    with replacing(folder) as draft:
        save_file(weights(model), draft / "model.safetensors")


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
