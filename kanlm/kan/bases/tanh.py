"""tanh as a rational function, for the kernels that squash millions of inputs a step.

The library's tanh takes several times as long as all else that a polynomial basis does to an
input. This one is off by less than 4e-7 of the value in float32, where the library's is by 1e-7.
"""

from typing import Any

import torch
from torch import Tensor

#: tanh(t) = t P(t²) / Q(t²) for |t| ≤ LIMIT, where it is 1 to float32's last bit: coefficients
#: by rising powers, fitted to the least largest relative error (2e-8).
LIMIT = 9.0
NUMERATOR = (1.0, 0.133810322, 0.00349559575, 2.06091994e-05, 1.33548083e-08)
DENOMINATOR = (1.0, 0.467143478, 0.0258770117, 0.000328564692, 7.77662165e-07)


def squashed(x: Tensor, half_width: float) -> Tensor:
    """R tanh(x / R), by the rational function where it is faster: compiled for a CPU."""
    t = x / half_width
    fast = torch.compiler.is_compiling() and t.device.type == "cpu" and t.dtype == torch.float32
    return half_width * (_Tanh.apply(t) if fast else torch.tanh(t))


class _Tanh(torch.autograd.Function):
    """The rational function with tanh's own derivative, 1 − tanh²."""

    @staticmethod
    def forward(t: Tensor) -> Tensor:
        t = t.clamp(-LIMIT, LIMIT)
        square = t * t
        return t * _polynomial(square, NUMERATOR) / _polynomial(square, DENOMINATOR)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        return gradients[0] * (1 - output * output)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value
