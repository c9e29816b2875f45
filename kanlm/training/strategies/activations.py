"""What layers are given on a text: mean squares and products of the functions of their inputs."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kanlm.kan import KANLinear
from kanlm.kan.base_functions import BASE_FUNCTIONS
from kanlm.training.callbacks import Batch
from kanlm.training.distributed import sum_over_ranks
from kanlm.training.sharding import reshard

if TYPE_CHECKING:
    from kanlm.training.trainer import Trainer


@dataclass(frozen=True)
class Measure:
    """What is averaged over tokens.

    Attributes:
        total: of a layer and its inputs, (rows, in), the sum over rows, in float64.
        shape: of that, by the layer alone.
    """

    total: Callable[[Any, Tensor], Tensor]
    shape: Callable[[Any], tuple[int, ...]]


def kan_layers(model: nn.Module) -> dict[str, KANLinear]:
    """The layers whose edges own their functions, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, KANLinear)}


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear maps within feed-forward blocks, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".feed_forward." in f".{name}."
    }


def functions(layer: KANLinear, x: Tensor) -> Tensor:
    """The functions that a layer's edges combine, at its inputs: (rows, in) → (rows, in, B + 1).

    The last is the base function; without one there are B.
    """
    values = layer.basis.values(x)
    if layer.base is None or layer.base_weight is None:
        return values
    return torch.cat([values, BASE_FUNCTIONS[layer.base](x).unsqueeze(-1)], dim=-1)


def number_of_functions(layer: KANLinear) -> int:
    """How many `functions` has: B + 1, or B without a base."""
    return layer.basis.num_functions + (layer.base is not None and layer.base_weight is not None)


def _squares(layer: KANLinear, x: Tensor) -> Tensor:
    return functions(layer, x).double().square().sum(dim=0)


def _products(layer: KANLinear, x: Tensor) -> Tensor:
    values = functions(layer, x).double().transpose(0, 1)
    return values.transpose(-1, -2) @ values


def _covariance(layer: nn.Linear, x: Tensor) -> Tensor:
    rows = x.double()
    return rows.T @ rows


#: E[φ_b(x_i)²], (in, B + 1): the diagonal of `PRODUCTS`.
OCCUPANCY = Measure(_squares, lambda layer: (layer.in_features, number_of_functions(layer)))
#: E[φ_b(x_i) φ_c(x_i)], (in, B + 1, B + 1).
PRODUCTS = Measure(_products, lambda layer: (layer.in_features, *2 * (number_of_functions(layer),)))
#: E[x xᵀ], (in, in).
COVARIANCE = Measure(_covariance, lambda layer: (layer.in_features, layer.in_features))


def mean_over_tokens(
    trainer: "Trainer",
    layers: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    measure: Measure,
) -> dict[str, Tensor]:
    """Means over the tokens of all ranks of what `measure` makes of each layer's inputs.

    Dropout is off. Sums are in float64, over ranks as well. A layer that no token reaches, as an
    expert may be, is left out.

    Args:
        batches: this rank's rows, in as many batches as the other ranks have.
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)

    def add(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach().reshape(-1, arguments[0].shape[-1])
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            with torch.autocast(x.device.type, enabled=False):
                found = measure.total(module, x)
            sums[name] = sums[name] + found if name in sums else found
            counts[name] += len(x)

        return hook

    model, accelerator = trainer.model, trainer.accelerator
    hooks = [layer.register_forward_pre_hook(add(name)) for name, layer in layers.items()]
    was_training = model.training
    model.eval()
    try:
        # Compiled code would not see the hooks.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), accelerator.autocast():
            for batch in batches:
                inputs = {k: v.to(accelerator.device) for k, v in batch.items()}
                del inputs["shift_labels"]
                model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
        # A pass without gradients leaves what is outside the blocks whole.
        reshard(model)
    return _means(trainer, layers, measure, sums, counts)


def _means(
    trainer: "Trainer",
    layers: Mapping[str, nn.Module],
    measure: Measure,
    sums: Mapping[str, Tensor],
    counts: Mapping[str, int],
) -> dict[str, Tensor]:
    """Sums over ranks divided by their tokens, of the layers that any rank's tokens reach."""
    accelerator = trainer.accelerator
    own = torch.tensor(list(counts.values()), dtype=torch.float64, device=accelerator.device)
    every = sum_over_ranks(accelerator, own).tolist()
    found = {}
    for (name, layer), count in zip(layers.items(), every, strict=True):
        if not count:
            continue
        total = sums.get(name)
        if total is None:
            shape, device = measure.shape(layer), accelerator.device
            total = torch.zeros(shape, dtype=torch.float64, device=device)
        found[name] = sum_over_ranks(accelerator, total) / count
    return found
