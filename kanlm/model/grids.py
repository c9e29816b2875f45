"""A model whose splines' grids change: its layers, and what its config says of them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..kan import KANLinear, Occupancy, SharedFunctions
from ..kan.bases import BASES, Adaptable, Refinable
from ..kan.grid import Refit, adapt_layer, refine_layer
from .decoder import KanLMForCausalLM
from .settings import ModelSettings


def grid_layers(model: nn.Module) -> Iterator[tuple[str, KANLinear | SharedFunctions]]:
    """Name and layer of everything with coefficients over a basis that has a grid."""
    for name, module in model.named_modules():
        if isinstance(module, KANLinear | SharedFunctions) and isinstance(module.basis, Refinable):
            yield name, module


def grid_sizes(settings: ModelSettings, capability: type[Refinable] = Refinable) -> set[int]:
    """The grid sizes that the feed-forward blocks' bases state.

    Args:
        capability: of bases of that class alone.
    """
    found: set[int] = set()

    def note(basis: Mapping[str, Any]) -> dict[str, Any]:
        if issubclass(BASES[basis["kind"]], capability):
            found.add(basis["grid_size"])
        return dict(basis)

    _map_grids(settings, note)
    return found


def with_grid_size(settings: ModelSettings, grid_size: int) -> ModelSettings:
    """The same model with all its grids of another size; widths stay."""
    return _map_grids(settings, lambda basis: {**basis, "grid_size": grid_size})


def refine_model(model: KanLMForCausalLM, grid_size: int) -> dict[str, Tensor]:
    """Put every grid of the model on a finer one, its outputs unchanged, and say so in its config.

    The layers' coefficients are new parameters afterwards.

    Args:
        grid_size: a multiple of the present one.

    Returns: name of each new parameter → the matrix that `refine_moments` takes.

    Raises:
        ValueError: grid_size is no multiple of a layer's.
    """
    matrices = {
        f"{name}.coefficients": refine_layer(layer, grid_size)
        for name, layer in list(grid_layers(model))
    }
    model.config.feed_forward = with_grid_size(model.config.settings, grid_size).feed_forward
    return matrices


def adapt_model(
    model: KanLMForCausalLM, batch: Mapping[str, Any], *, uniform_share: float
) -> dict[str, Refit]:
    """Move every grid that can be moved to the inputs that its layer has on a batch.

    Functions stay as they are where inputs fall. All inputs are those before any grid moves.
    The layers' coefficients are new parameters afterwards.

    Args:
        batch: what the model's forward takes.
        uniform_share: as of `kanlm.kan.grid.adapt_layer`.

    Returns: name of each new parameter → its matrix and the error left.
    """
    layers = {
        name: layer
        for name, layer in grid_layers(model)
        if isinstance(layer, KANLinear) and isinstance(layer.basis, Adaptable)
    }
    inputs = _inputs(model, layers, batch)
    return {
        f"{name}.coefficients": adapt_layer(layer, inputs[name], uniform_share=uniform_share)
        for name, layer in layers.items()
    }


def occupancies(model: KanLMForCausalLM, batch: Mapping[str, Any]) -> dict[str, Occupancy]:
    """Where the inputs of every KAN layer on a batch fall in the range of its basis.

    Args:
        batch: what the model's forward takes.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, KANLinear)}
    found = {}
    for name, inputs in _inputs(model, layers, batch).items():
        found[name] = Occupancy(layers[name].basis, layers[name].in_features)
        found[name].update(inputs)
    return found


def first_sequences(
    batch: Mapping[str, Tensor], device: torch.device, count: int = 16
) -> dict[str, Tensor]:
    """The first sequences of a batch, without labels, to look at a layer's inputs."""
    return {key: value[:count].to(device) for key, value in batch.items() if key != "shift_labels"}


def _inputs(
    model: KanLMForCausalLM, layers: Mapping[str, nn.Module], batch: Mapping[str, Any]
) -> dict[str, Tensor]:
    """What the layers are given on a batch, without dropout; nothing where none reaches one."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, arguments: inputs.update({name: arguments[0].detach()})

    hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    was_training = model.training
    model.eval()
    try:
        # Compiled code would not see the hooks.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model(**batch, use_cache=False, logits_to_keep=1)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return inputs


def _map_grids(
    settings: ModelSettings, change: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> ModelSettings:
    """Apply `change` to the options of every basis that has a grid."""

    def changed(value: Any) -> Any:
        if isinstance(value, list):
            return [changed(item) for item in value]
        if not isinstance(value, Mapping):
            return value
        inner = {key: changed(item) for key, item in value.items()}
        kind = BASES.get(str(inner.get("kind")))
        return change(inner) if kind is not None and issubclass(kind, Refinable) else inner

    return replace(settings, feed_forward=changed(settings.feed_forward))
