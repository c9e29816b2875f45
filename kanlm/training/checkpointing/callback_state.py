"""What callbacks keep: in checkpoints, and at the end of a run for the run that follows it.

A checkpoint's tensors are those of kind `callbacks`, named CALLBACK:NAME; other values are in its
state.json. The folder `callbacks/` of a finished run has the same form.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kanlm.checksums import find_damage
from kanlm.config import TrainingSettings
from kanlm.errors import UserError
from kanlm.kan.sharding import own_part, own_rows
from kanlm.training.callbacks import Callback
from kanlm.training.checkpointing.reader import read_state
from kanlm.training.checkpointing.tensors import StoredTensors


class PreviousState:
    """What a callback left at the end of the run that this one is fine-tuned from.

    Attributes:
        values: by name.
    """

    def __init__(self, stored: StoredTensors, name: str, values: dict[str, Any]) -> None:
        self._stored, self._name, self.values = stored, name, values

    def names(self) -> list[str]:
        """The names of its tensors."""
        own = f"{self._name}:"
        return [name.removeprefix(own) for name in self._stored if name.startswith(own)]

    def tensor(self, name: str, like: Tensor | None = None) -> Tensor:
        """One of the tensors.

        Args:
            like: a tensor, such as a parameter, on whose device and ranks it is placed; None
                puts all of it on the CPU of every rank.

        Raises:
            UserError: there is none of that name, or `like` has another shape.
        """
        full = f"{self._name}:{name}"
        if full not in self._stored.shapes:
            raise UserError(f"{self._name}: the previous run left no tensor {name!r}")
        shape = self._stored.shapes[full]
        if like is None:
            return self._stored.rows(full, 0, shape[0] if shape else 1)
        if tuple(like.shape) != shape:
            raise UserError(
                f"{self._stored.path}: {full} is {shape}, and {tuple(like.shape)} in this run"
            )
        found = torch.empty_like(like.detach())
        fill(found, self._stored, full)
        return found


def fill(tensor: Tensor, stored: StoredTensors, name: str) -> None:
    """Read into a tensor, whole or sharded, the rows that this rank holds of it."""
    with torch.no_grad():
        own_part(tensor).copy_(stored.rows(name, *own_rows(tensor)))


def check_callbacks(callbacks: Sequence[Callback], training: TrainingSettings) -> None:
    """Check, once they have started, that callbacks can be told apart and follow grids.

    Raises:
        UserError: two have the same name, or grids will change under tensors that one keeps.
    """
    seen: set[str] = set()
    grids_change = bool(training.grid_schedule or training.grid_adaptation_steps)
    for callback in callbacks:
        follows = type(callback).parameters_replaced is not Callback.parameters_replaced
        if grids_change and not follows and collect_state([callback])[0]:
            raise UserError(
                f"callback {callback.name} keeps tensors and does not say what becomes of them "
                "when grids change: define its parameters_replaced, or leave out "
                "training.grid_schedule and training.grid_adaptation_steps"
            )
        if callback.name in seen:
            raise UserError(
                f"two callbacks are named {callback.name}: give one of them another `name`"
            )
        seen.add(callback.name)


def collect_state(
    callbacks: Sequence[Callback],
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The state of callbacks that keep any, as `split_state` has it."""
    states = {callback.name: callback.state_dict() for callback in callbacks}
    return split_state({name: state for name, state in states.items() if state})


def split_state(
    states: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Tensors by CALLBACK:NAME, and by callback the other values.

    Args:
        states: by callback and name.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for callback, state in states.items():
        values[callback] = {}
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{callback}:{name}"] = value.detach()
            else:
                values[callback][name] = value
    return tensors, values


def load_state(
    callbacks: Sequence[Callback], folder: Path, values: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give the callbacks the state that a checkpoint holds of them.

    Args:
        folder: the checkpoint.
        values: by callback and name, from its state.json.

    Raises:
        UserError: it holds state of other callbacks than these, or of other names or shapes.
    """
    tensors, own_values = collect_state(callbacks)
    stored = StoredTensors(folder, "callbacks")
    _check_same(folder, "callback", own_values, values)
    for name, own in own_values.items():
        _check_same(folder, f"callback {name}'s state", own, values[name])
    _check_same(folder, "callbacks' state", tensors, stored.shapes)
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != stored.shapes[name]:
            raise UserError(
                f"{folder}: {name} of the callbacks' state is {stored.shapes[name]} there, and "
                f"{tuple(tensor.shape)} in this run"
            )
        fill(tensor, stored, name)
    for callback in callbacks:
        if callback.name in own_values:
            callback.load_state_dict({**callback.state_dict(), **values[callback.name]})


def _check_same(
    folder: Path, what: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> None:
    hint = "resume with the callbacks that the run was started with, or choose another output_dir"
    for name in ours:
        if name not in theirs:
            raise UserError(f"{folder} lacks {what}: {name}; {hint}")
    for name in theirs:
        if name not in ours:
            raise UserError(f"{folder} holds {what} that this run has not: {name}; {hint}")


def previous_state(run: str | None, name: str) -> PreviousState | None:
    """What the callback of that name left at the end of a run; None if it left nothing.

    Args:
        run: the run that this one is fine-tuned from.

    Raises:
        UserError: the run's `callbacks/` is damaged.
    """
    folder = None if run is None else Path(run) / "callbacks"
    if folder is None or not folder.exists():
        return None
    problem = find_damage(folder)
    if problem is not None:
        raise UserError(f"{folder} is damaged: {problem}")
    values = read_state(folder)
    if name not in values:
        return None
    return PreviousState(StoredTensors(folder, "callbacks"), name, values[name])
