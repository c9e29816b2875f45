"""Controls of the function-space strategies: the same numbers in places that mean nothing.

What a strategy gains with the numbers of the old text, and not with these, it owes to where the
old text is.
"""

from typing import Literal

import torch
from torch import Tensor

#: `none` takes what was measured; `random` keeps how much is held back and not where, and
#: `permuted` gives each input what was measured of another.
Control = Literal["none", "random", "permuted"]


def generator_for(seed: int, layer: int) -> torch.Generator:
    """Random numbers of a layer, the same on every rank and in every start."""
    return torch.Generator().manual_seed((seed * 1_000_003 + layer) % 2**63)


def control_values(values: Tensor, control: Control, generator: torch.Generator) -> Tensor:
    """Values by input and function, (in, B), in places by the control.

    Of `random` all are shuffled, and of `permuted` inputs.
    """
    if control == "random":
        order = torch.randperm(values.numel(), generator=generator).to(values.device)
        return values.flatten()[order].view_as(values)
    return _permuted(values, generator) if control == "permuted" else values


def control_products(matrices: Tensor, control: Control, generator: torch.Generator) -> Tensor:
    """Matrices of products by input, (in, B, B), in places by the control.

    Of `random` each is turned by a random rotation, which keeps its eigenvalues, and so how much
    is held back. Of `permuted` inputs are shuffled.
    """
    if control == "random":
        return _turned(matrices, generator)
    return _permuted(matrices, generator) if control == "permuted" else matrices


def control_covariance(matrix: Tensor, control: Control, generator: torch.Generator) -> Tensor:
    """A covariance of inputs, (in, in), in places by the control, as of `control_products`."""
    if control == "random":
        return _turned(matrix.unsqueeze(0), generator).squeeze(0)
    if control == "permuted":
        order = torch.randperm(len(matrix), generator=generator).to(matrix.device)
        return matrix[order][:, order]
    return matrix


def _permuted(values: Tensor, generator: torch.Generator) -> Tensor:
    return values[torch.randperm(len(values), generator=generator).to(values.device)]


def _turned(matrices: Tensor, generator: torch.Generator) -> Tensor:
    """Q M Qᵀ with orthogonal Q, drawn for each."""
    drawn = torch.randn(matrices.shape, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(drawn).Q.to(matrices)
    return rotation @ matrices @ rotation.transpose(-1, -2)
