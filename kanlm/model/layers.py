"""The elementary layers of the decoder: an embedding, a linear map with a gain, an RMS norm."""

import math

import torch
from torch import Tensor, nn

from ..kan.casts import narrowed
from ..kan.initialization import draw_
from ..kan.watchable import Watchable


class Embedding(nn.Embedding):
    """A table of vectors. Products with inputs of mean square 1, as a head that is tied to it
    forms, start with mean square 1."""

    def reset_parameters(self) -> None:
        start_table(self.weight)


def start_table(weight: Tensor) -> None:
    """Draw the rows of an embedding from a normal distribution, with mean square length 1."""
    draw_(weight, nn.init.normal_, std=1 / math.sqrt(weight.shape[-1]))


class Linear(nn.Linear):
    """A linear map without bias that keeps variance.

    For inputs of mean square 1 the outputs start with mean square gain² over the draw of
    the weights, which are uniform: their product of squares then scatters least.
    """

    def __init__(self, in_features: int, out_features: int, *, gain: float = 1.0) -> None:
        self.gain = gain
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        bound = self.gain * math.sqrt(3 / self.in_features)
        draw_(self.weight, nn.init.uniform_, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, narrowed(self.weight))

    @property
    def flops_per_token(self) -> int:
        return 2 * self.weight.numel()


class RMSNorm(Watchable):
    """Divide by the root mean square over the last dimension, then scale by a learned gain.

    (Zhang & Sennrich, arXiv 1910.07467, eq. 4.) Computed in float32 or, for float64
    inputs, in float64.
    """

    def __init__(self, width: int, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if x.dtype == weight.dtype:  # torch computes in float32 itself
            return nn.functional.rms_norm(x, weight.shape, weight, self.epsilon)
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = weight.to(wide)
        return nn.functional.rms_norm(x.to(wide), weight.shape, weight, self.epsilon).to(x.dtype)

    @property
    def flops_per_token(self) -> int:
        """Square, mean, scale, gain; the root is one."""
        return 4 * self.weight.numel() + 3

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, epsilon={self.epsilon:g}"
