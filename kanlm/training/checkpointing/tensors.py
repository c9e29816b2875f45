"""Tensors on the disk: written by who holds them, read by who wants them.

Where every rank has the whole model, the first one writes it:

    model.safetensors           weights and persistent buffers, grids among them
    optimizer.safetensors       the optimizer's moments, NAME:MOMENT for each parameter
    callbacks.safetensors       what callbacks keep, CALLBACK:NAME

Where it is sharded (FSDP2), each writes the rows that it holds, of several copies the first:

    model-rank-R.safetensors, optimizer-rank-R.safetensors, callbacks-rank-R.safetensors
    shards.json                 which rows of what lie where

Any number of ranks reads either: each takes its own rows out of the files, so that none ever
holds the whole. The safetensors storage of torch.distributed.checkpoint does the same, but has no
index: it takes a tensor to be as long as the pieces that it finds, so that a missing last piece
shortens it. And ranks plan every write together, for which a write in the background would need a
process group of its own.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from kanlm.config import check
from kanlm.errors import UserError, first_line
from kanlm.faults import fault_point
from kanlm.kan.sharding import from_own_part, is_first_copy, is_sharded, own_part, own_rows

INDEX = "shards.json"

#: By the algorithm of an optimizer's group.
MOMENTS = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "muon": {"momentum_buffer"}}

#: Which of the tensors.
Kind = Literal["model", "optimizer", "callbacks"]


@dataclass
class Layout:
    """A tensor's shape, and who has written which of its rows: (rank, first, after the last)."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    shape: list[int]
    parts: list[tuple[int, int, int]] = field(default_factory=list)


#: Name → layout, of each kind.
Index = dict[Kind, dict[str, Layout]]


@dataclass(frozen=True)
class OwnPart:
    """What one rank has to write.

    Attributes:
        tensors: by kind and name, the rows that are this rank's to write.
        index: where they belong; empty if nothing is sharded.
    """

    rank: int
    tensors: dict[Kind, dict[str, torch.Tensor]]
    index: Index

    @classmethod
    def of(cls, tensors: Mapping[Kind, Mapping[str, torch.Tensor]], rank: int) -> "OwnPart":
        """The part of `rank`, still in the tensors' own memory.

        Args:
            tensors: by kind and name, whole or sharded; each rank with its part (`reshard`).
        """
        sharded = any(is_sharded(tensor) for held in tensors.values() for tensor in held.values())
        part = cls(rank, {}, {})
        for kind, held in tensors.items():
            own = {name: tensor for name, tensor in held.items() if is_first_copy(tensor, rank)}
            part.tensors[kind] = {name: own_part(tensor) for name, tensor in own.items()}
            if sharded:
                part.index[kind] = {
                    name: Layout(list(tensor.shape), [(rank, *own_rows(tensor))])
                    for name, tensor in own.items()
                    if own_part(tensor).numel()
                }
        return part

    def copied(self) -> "OwnPart":
        """The same in memory of its own on the host, which training leaves alone."""
        tensors: dict[Kind, dict[str, torch.Tensor]] = {
            kind: {name: tensor.to("cpu", copy=True) for name, tensor in held.items()}
            for kind, held in self.tensors.items()
        }
        return OwnPart(self.rank, tensors, self.index)

    def write(self, folder: Path) -> list[Path]:
        """Write the files that are this process's, and say which these are.

        Raises:
            OSError, SafetensorError: one cannot be written.
        """
        files: list[Path] = []
        for kind, held in self.tensors.items():
            if held or self.rank == 0:
                files.append(_file(folder, kind, self.rank if self.index else None))
                save_file({name: t.contiguous() for name, t in held.items()}, files[-1])
            fault_point("inside-checkpoint-write")
        return files


def write_index(folder: Path, by_rank: list[Index]) -> None:
    """Write `shards.json` of what the processes have written, unless the first wrote all."""
    joined: Index = {}
    for layouts in by_rank:
        for kind, tensors in layouts.items():
            for name, layout in tensors.items():
                place = joined.setdefault(kind, {}).setdefault(name, Layout(layout.shape))
                place.parts.extend(layout.parts)
    if joined:
        tree = {
            kind: {name: asdict(layout) for name, layout in tensors.items()}
            for kind, tensors in joined.items()
        }
        (folder / INDEX).write_text(json.dumps(tree))


class StoredTensors:
    """The tensors of one kind in a folder, of each of which any rows can be read.

    Attributes:
        folder, kind: as asked for.
        path: what to name in a message.
        shapes: name → shape.

    Raises:
        UserError: a file cannot be read.
    """

    def __init__(self, folder: Path, kind: Kind) -> None:
        self.folder: Path = folder
        self.kind: Kind = kind
        self._files: dict[int | None, Any] = {}
        self._parts: dict[str, list[tuple[int | None, int, int]]] = {}
        if (folder / INDEX).exists():
            self.path = folder / INDEX
            layouts = _read_index(self.path).get(kind, {})
            self.shapes = {name: tuple(layout.shape) for name, layout in layouts.items()}
            for name, layout in layouts.items():
                self._parts[name] = sorted(layout.parts, key=lambda part: part[1])
            return
        self.path = _file(folder, kind, None)
        self.shapes = {name: self._shape(None, name) for name in self._open(None).keys()}  # noqa: SIM118
        for name, shape in self.shapes.items():
            self._parts[name] = [(None, 0, shape[0] if shape else 1)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start…stop−1 of a tensor; of one without dimensions, all that it is.

        Raises:
            UserError: they are not there, or are of another shape.
        """
        shape, pieces, reached = self.shapes[name], [], start
        for rank, first, last in self._checked_parts(name):
            if not shape:
                return self._open(rank).get_tensor(name)
            if start == stop:
                # Of no rows it still has the type.
                return self._open(rank).get_slice(name)[:1][:0]
            begin, end = max(first, reached), min(last, stop)
            if first <= reached and begin < end:
                pieces.append(self._open(rank).get_slice(name)[begin - first : end - first])
                reached = end
        if reached < stop or not self._parts[name]:
            raise UserError(
                f"{self.path} is damaged: row {reached} of {name} is in none of the files"
            )
        types = {piece.dtype for piece in pieces}
        if len(types) > 1:
            raise UserError(f"{self.path} is damaged: {name} is of several types: {types}")
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _checked_parts(self, name: str) -> list[tuple[int | None, int, int]]:
        """Who has which rows, the first rows first: files that agree, no row in two of them."""
        shape, reached = self.shapes[name], 0
        for rank, first, last in self._parts[name]:
            found = self._shape(rank, name)
            expected = (last - first, *shape[1:]) if shape else ()
            if found != expected:
                raise UserError(
                    f"{self.path} is damaged: {name} is {found} in "
                    f"{_file(self.folder, self.kind, rank).name}, not {expected}"
                )
            if first < reached:
                raise UserError(
                    f"{self.path} is damaged: row {first} of {name} is in two of the files"
                )
            reached = last
        return self._parts[name]

    def _open(self, rank: int | None) -> Any:
        if rank not in self._files:
            path = _file(self.folder, self.kind, rank)
            try:
                self._files[rank] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} cannot be read: {first_line(error)}") from None
        return self._files[rank]

    def _shape(self, rank: int | None, name: str) -> tuple[int, ...]:
        try:
            return tuple(self._open(rank).get_slice(name).get_shape())
        except SafetensorError as error:
            path = _file(self.folder, self.kind, rank)
            raise UserError(f"{path} cannot be read: {first_line(error)}") from None


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, a tied one once."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def load_weights(model: nn.Module, folder: Path) -> None:
    """Put the weights in a folder into the model, which they must fit exactly.

    Raises:
        UserError: naming the first tensor that is missing, left over or of another shape.
    """
    stored, own = StoredTensors(folder, "model"), weights(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    for name in dict.fromkeys([*own, *stored]):
        theirs, ours = stored.shapes.get(name, "absent"), shapes.get(name, "absent")
        if theirs != ours:
            raise UserError(
                f"{stored.path} is of another architecture: {name} is {theirs} there and "
                f"{ours} in this model"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            rows = stored.rows(name, *own_rows(tensor))
            if rows.is_floating_point() != tensor.is_floating_point():
                raise UserError(
                    f"{stored.path} is of another architecture: {name} is {rows.dtype} there and "
                    f"{tensor.dtype} in this model"
                )
            own_part(tensor).copy_(rows)


def load_moments(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Put the moments in a folder into the optimizer, which is over the model's parameters.

    Raises:
        UserError: naming the first that is of no parameter, or of another shape than its own.
    """
    stored = StoredTensors(folder, "optimizer")
    parameters = dict(model.named_parameters())
    states: dict[str, dict[str, torch.Tensor]] = {}
    for key, shape in stored.shapes.items():
        name, _, moment = key.rpartition(":")
        parameter = parameters.get(name)
        if parameter is None:
            raise UserError(f"{stored.path} is of another architecture: {key} is of no parameter")
        # Only steps are counted for a parameter as a whole.
        expected = () if moment == "step" else tuple(parameter.shape)
        if shape != expected:
            raise UserError(
                f"{stored.path} is of another architecture: {key} is {shape} there, and "
                f"{expected} in this model"
            )
        value = stored.rows(key, *(own_rows(parameter) if shape else (0, 1)))
        value = value.to(parameter.device)
        if shape:
            value = from_own_part(parameter.detach(), value)
        states.setdefault(name, {})[moment] = value
    for group in optimizer.param_groups:
        wanted = MOMENTS[group["algorithm"]]
        for name, parameter in parameters.items():
            missing = wanted - states.get(name, {}).keys()
            if name in states and missing and any(parameter is p for p in group["params"]):
                raise UserError(f"{stored.path} is damaged: {name}:{min(missing)} is missing")
    optimizer.state.clear()
    for name, state in states.items():
        optimizer.state[parameters[name]] = state


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state by NAME:MOMENT."""
    return {
        f"{name}:{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _file(folder: Path, kind: Kind, rank: int | None) -> Path:
    return folder / (f"{kind}.safetensors" if rank is None else f"{kind}-rank-{rank}.safetensors")


def _read_index(path: Path) -> Mapping[Kind, dict[str, Layout]]:
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    return check(Index, tree, str(path))
