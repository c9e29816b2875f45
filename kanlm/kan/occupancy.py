"""Where the inputs of a layer fall on its grid, and which functions they use."""

from typing import Self

import torch
from torch import Tensor

from .bases import Basis
from .bases.base import working_dtype


class Occupancy:
    """Running statistics of a basis' inputs, channel by channel.

    They are sums and nothing else, so those of several processes or times can be added:
    `merge` adds another's, and `torch.distributed.all_reduce(occupancy.sums)` all processes'.

    Only inputs in the range count towards a function's use: where functions go on linearly,
    one far input would drown the rest.

    Args:
        basis: read at each update, and neither changed nor kept in step: after its grid has
            changed, start anew.
        in_features: channels of the inputs.

    Attributes:
        sums: (in, 2 + B) in float64: inputs, inputs in the range, and Σ φ_b² over the latter.
    """

    def __init__(self, basis: Basis, in_features: int) -> None:
        self.basis = basis
        self.sums = torch.zeros(in_features, 2 + basis.num_functions, dtype=torch.float64)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add inputs, (…, in); the sums move to their device."""
        rows = x.detach().reshape(-1, x.shape[-1])
        rows = rows.to(working_dtype(rows.dtype))
        low, high = self.basis.ends.to(rows).unbind(1)
        inside = (rows >= low) & (rows <= high)
        squares = self.basis.values(torch.where(inside, rows, 0.0)).square()
        used = (squares * inside.unsqueeze(-1)).sum(dim=0, dtype=torch.float64)
        count = used.new_full((rows.shape[-1],), len(rows))
        counts = torch.stack([count, inside.sum(dim=0).double()], dim=-1)
        self.sums = self.sums.to(rows.device) + torch.cat([counts, used], dim=-1)

    def merge(self, other: Self) -> None:
        """Add the sums of another of the same basis and inputs."""
        self.sums = self.sums + other.sums.to(self.sums.device)

    @property
    def in_range(self) -> Tensor:
        """Fraction of each channel's inputs in the range, (in,); 1 where there were none."""
        count, inside = self.sums[:, 0], self.sums[:, 1]
        return torch.where(count > 0, inside / count, 1.0)

    @property
    def use(self) -> Tensor:
        """E[φ_b²] over inputs in the range, as shares that sum to one, (in, B).

        A function that no input reaches has 0. A channel without inputs in range is all 0.
        """
        used = self.sums[:, 2:]
        total = used.sum(dim=1, keepdim=True)
        return torch.where(total > 0, used / total, 0.0)
