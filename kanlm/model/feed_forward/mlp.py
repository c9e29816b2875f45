"""The baselines: multilayer perceptrons with a fixed activation."""

import math
from abc import abstractmethod
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from ...kan.moments import unit_normal_mean
from ..layers import Linear
from .base import FeedForward


class _MLP(FeedForward):
    """Linear, activation, linear."""

    #: FLOPs of the activation at one channel.
    activation_flops: ClassVar[int]

    def __init__(self, d_model: int, hidden: int, output_scale: float) -> None:
        super().__init__(d_model, hidden, output_scale)
        mean_square = unit_normal_mean(lambda z: self.activation(z).square())
        self.up = Linear(d_model, hidden)
        self.down = Linear(hidden, d_model, gain=output_scale / math.sqrt(mean_square))

    @staticmethod
    @abstractmethod
    def activation(x: Tensor) -> Tensor: ...

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))

    @property
    def flops_per_token(self) -> int:
        linear = self.up.flops_per_token + self.down.flops_per_token
        return linear + self.hidden * self.activation_flops


class GELU(_MLP):
    """MLP with the exact GELU (Hendrycks & Gimpel, arXiv 1606.08415)."""

    label = "gelu"
    activation_flops = 5

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        return F.gelu(x)


class ReLU2(_MLP):
    """MLP with the squared ReLU (So et al., arXiv 2109.08668)."""

    label = "relu2"
    activation_flops = 2

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        return F.relu(x).square()


class SwiGLU(FeedForward):
    """SiLU of one linear map times another, then a third (Shazeer, arXiv 2002.05202)."""

    label = "swiglu"

    def __init__(self, d_model: int, hidden: int, output_scale: float) -> None:
        super().__init__(d_model, hidden, output_scale)
        mean_square = unit_normal_mean(lambda z: F.silu(z).square())
        self.gate = Linear(d_model, hidden)
        self.up = Linear(d_model, hidden)
        self.down = Linear(hidden, d_model, gain=output_scale / math.sqrt(mean_square))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))

    @property
    def flops_per_token(self) -> int:
        linear = sum(layer.flops_per_token for layer in (self.gate, self.up, self.down))
        return linear + 5 * self.hidden
