"""Muon: momentum whose update is orthogonalised, for hidden matrices.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), with the scale of Liu et al.
(arXiv 2502.16982, eq. 4), by which an update has the root mean square of AdamW's, 0.2, so that
both take a learning rate and a decay of the same size. `torch.optim.Muon` computes the same, but
takes matrices alone and fails on shards of different sizes.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kanlm.kan.sharding import gathered, split_as

#: Coefficients of the quintic iteration: the steepest at 0 that bring singular values of (0, 1]
#: near 1 in five steps (Jordan et al.).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
#: Least norm that is divided by.
_LEAST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """Muon over matrices (out, in), and over coefficients (in, B, out) as the matrix
    (out, in · B) that they are.

    A sharded matrix is gathered for its update, which every process computes whole and keeps its
    part of; the momentum stays sharded.

    Args:
        groups: parameter groups; `weight_decay` is read from each.
        lr: learning rate of groups that state none.
        momentum: of Nesterov's kind.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        ahead = gathered(gradient.lerp(momentum, group["momentum"]))
        matrix = ahead if ahead.ndim == 2 else ahead.flatten(0, 1).T
        update = orthogonalized(matrix)
        rate = group["lr"] * 0.2 * math.sqrt(max(matrix.shape))
        whole = (update if ahead.ndim == 2 else update.T).reshape(ahead.shape)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(split_as(parameter, whole, alike=True), alpha=-rate)


def orthogonalized(matrix: Tensor) -> Tensor:
    """U S Vᵀ for a matrix U Σ Vᵀ, with S near 1 in place of Σ, by five steps of Newton and Schulz.

    Args:
        matrix: (m, n).

    Returns: (m, n), in bfloat16, in which the iteration runs.
    """
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    # The spectral norm is at most this one.
    x = x / x.norm().clamp(min=_LEAST_NORM)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.T if tall else x
