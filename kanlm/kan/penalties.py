"""What a training loss can add so that edge functions become few, smooth or small.

Each penalty is a pure function of one layer's coefficients c, of shape (in, B, out): edge
(i, o) owns the B numbers c_i·o. None looks at the base function or at activations. The KAN
paper's norm of an edge is the mean of |φ| over the inputs, which takes a tensor of
(batch, in, out) that no fast layer ever forms. The mean of |c| in its place is efficient-kan's
choice, and needs no data: a penalty is then the same whatever the batch, and is taken once a
step. For B-splines, which are ≥ 0 and integrate to at most the width of a cell, B / G times it
bounds the mean of |φ| over a grid of G equal cells.

Sums are over edges, as in the paper, so a weight that suits one width is too large for a
wider layer.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from .bases import Basis, Curved
from .sharding import gathered


class Edges(Protocol):
    """A layer with edge functions, such as `KANLinear`."""

    #: Evaluates the B functions.
    basis: Basis
    #: (in, B, out); (groups, B, R) where R functions of a group of inputs are shared.
    coefficients: nn.Parameter


def l1(layer: Edges) -> Tensor:
    """Sum over edges of their L1 norm: Σ_io |φ_io|₁ with |φ_io|₁ = Σ_b |c_ibo| / B.

    (Liu et al., arXiv 2404.19756, eq. 2.18, with the norm that this module explains.)
    """
    return _norms(layer).sum()


def entropy(layer: Edges) -> Tensor:
    """Entropy of the edges' shares of the layer's L1 norm: S = −Σ_io p_io ln p_io.

    (Liu et al., eq. 2.19, with p_io = |φ_io|₁ / Σ |φ|₁.) It is 0 where one edge has it all
    and ln(in · out) where all have the same. Value and gradient are finite everywhere: an
    edge that is 0 adds 0 and has a gradient of 0, and so has a layer that is 0.
    """
    norms = _norms(layer)
    limits = torch.finfo(norms.dtype)
    # p may be far less than eps, a layer's norm that is less than eps is as good as 0.
    shares = norms / norms.sum().clamp(min=limits.eps)
    return (shares * -shares.clamp(min=limits.tiny).log()).sum()


def smoothness(layer: Edges) -> Tensor:
    """Squared second differences: Σ_io Σ_b (c_{b+2} − 2 c_{b+1} + c_b)².

    The penalty of P-splines (Eilers & Marx 1996), which takes no notice of the
    distances between knots. It is 0 for a straight line over equal cells.

    Raises:
        ValueError: the functions do not stand in a row along x, or are fewer than 3.
    """
    if not layer.basis.in_a_row:
        raise ValueError(
            f"smoothness of {layer.basis.label}: expected a basis whose functions stand in a "
            "row along x, such as bspline or rbf"
        )
    if layer.basis.num_functions < 3:
        raise ValueError(f"smoothness of {layer.basis.label}: expected at least 3 functions")
    return _wide(layer).diff(n=2, dim=1).square().sum()


def curvature(layer: Edges) -> Tensor:
    """Exact Σ_io ∫ φ_io″(x)² dx of spline edges, as cᵀ Q c with the basis' matrix.

    In float64, for a smooth function on a fine grid is a small difference of large terms.

    (Reinsch 1967; de Boor, A Practical Guide to Splines, 2001, ch. XIV.) Beyond the grid a
    spline goes on as a straight line, so that the integral over the grid is all of it.

    Raises:
        ValueError: the basis is no spline of degree 2 or more, or has another number of
            grids than the layer has rows of coefficients.
    """
    if not isinstance(layer.basis, Curved):
        raise ValueError(f"curvature of {layer.basis.label}: expected a bspline")
    matrix, coefficients = layer.basis.curvature_matrix(), _wide(layer)
    if len(matrix) not in (1, len(coefficients)):
        raise ValueError(
            f"curvature of {layer.basis.label}: {len(matrix)} grids for coefficients of "
            f"{len(coefficients)} inputs"
        )
    exact = coefficients.double()
    return (exact * (matrix @ exact)).sum().to(coefficients.dtype)


def l2(layer: Edges) -> Tensor:
    """Sum of squared coefficients, Σ_io Σ_b c_ibo²."""
    return _wide(layer).square().sum()


#: Penalties by the names of their weights.
PENALTIES = {
    "l1": l1,
    "entropy": entropy,
    "smoothness": smoothness,
    "curvature": curvature,
    "l2": l2,
}


def penalty(model: nn.Module, weights: Mapping[str, float]) -> Tensor:
    """Weighted sum of penalties over all layers with edge functions in a model, ().

    Args:
        weights: λ by the name in `PENALTIES`; those of 0 are not computed.

    Raises:
        ValueError: the model has no such layer, or one of which a penalty makes no sense.
    """
    layers = list(edge_layers(model))
    if not layers:
        raise ValueError("the model has no KAN layer, whose coefficients they could act on")
    terms = [
        weight * PENALTIES[name](layer)
        for layer in layers
        for name, weight in weights.items()
        if weight != 0
    ]
    first = layers[0].coefficients
    return sum(terms, start=torch.zeros((), dtype=first.dtype, device=first.device))


def edge_layers(model: nn.Module) -> Iterator[Edges]:
    """The modules of a model that own `coefficients` of a `basis`."""
    for module in model.modules():
        owned = dict(module.named_parameters(recurse=False))
        if "coefficients" in owned and isinstance(getattr(module, "basis", None), Basis):
            yield module  # pyright: ignore[reportReturnType]


def _norms(layer: Edges) -> Tensor:
    """|φ_io|₁ of every edge, (in, out)."""
    return _wide(layer).abs().mean(dim=1)


def _wide(layer: Edges) -> Tensor:
    """The coefficients in float32 at least; gathered where they are sharded."""
    coefficients = gathered(layer.coefficients)
    return coefficients.to(torch.promote_types(coefficients.dtype, torch.float32))
