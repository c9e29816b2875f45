"""The elementary layers against their formulas in float64."""

import pytest
import torch

from kanlm.model.layers import RMSNorm


@pytest.mark.parametrize("input_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_norm_computes_in_float32_at_least_and_keeps_the_dtype(input_dtype, weight_dtype):
    """Rounded once: values and gradients are within one place of the inputs' type."""
    norm = RMSNorm(64, epsilon=1e-3).to(weight_dtype)
    torch.nn.init.normal_(norm.weight)
    x = (3 * torch.randn(50, 64)).to(input_dtype).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    gain = norm.weight.detach().double()
    exact = exact_x / (exact_x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * gain
    y = norm(x)
    assert y.dtype == input_dtype
    dy = torch.randn(50, 64).to(input_dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    (exact_dx,) = torch.autograd.grad(exact, exact_x, dy.double())
    place = max(torch.finfo(input_dtype).eps, 4 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(y.double(), exact, rtol=place, atol=place / 100)
    torch.testing.assert_close(dx.double(), exact_dx, rtol=place, atol=4 * place)
