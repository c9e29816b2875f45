"""Expectations over a unit normal, from which every layer's starting scale is derived."""

import math
from collections.abc import Callable

import torch


def unit_normal_mean(function: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """E[function(z)] for z ~ N(0, 1), by the trapezoid rule on [-8, 8].

    Always on the CPU in float64, whatever the ambient device and dtype, so that a layer
    built on the meta device or in bfloat16 starts with the same scale. Accurate to 1e-5
    for functions with a few kinks and far better for smooth ones; to 1% for splines of
    hundreds of cells.

    Args:
        function: maps z of shape (n,) to (n,).
    """
    z, weights = _quadrature()
    return (function(z) * weights).sum().item()


def unit_normal_projection(
    functions: Callable[[torch.Tensor], torch.Tensor],
    target: Callable[[torch.Tensor], torch.Tensor],
) -> list[float]:
    """Coefficients c that minimise E[(Σ_b c_b φ_b(z) − target(z))²] for z ~ N(0, 1).

    Of several such c, the shortest.

    Args:
        functions: maps z of shape (n,) to (n, B).
        target: maps z of shape (n,) to (n,).
    """
    z, weights = _quadrature()
    root = weights.sqrt()
    columns = functions(z) * root.unsqueeze(-1)
    solution = torch.linalg.lstsq(columns, (target(z) * root).unsqueeze(-1), driver="gelsd")
    return solution.solution.squeeze(-1).tolist()


def unit_normal_products(
    functions: Callable[[torch.Tensor], torch.Tensor],
) -> list[list[float]]:
    """E[φ_a(z) φ_b(z)] for z ~ N(0, 1), the matrix (B, B) of functions' inner products.

    Args:
        functions: maps z of shape (n,) to (n, B).
    """
    z, weights = _quadrature()
    values = functions(z)
    return (values.T @ (values * weights.unsqueeze(-1))).tolist()


def _quadrature() -> tuple[torch.Tensor, torch.Tensor]:
    """Points and weights whose sums are expectations over a unit normal."""
    z = torch.linspace(-8.0, 8.0, 4001, dtype=torch.float64, device="cpu")
    weights = torch.exp(-z.square() / 2) * ((z[1] - z[0]) / math.sqrt(2 * math.pi))
    weights[[0, -1]] /= 2
    return z, weights
