"""The rational tanh against the library's in float64."""

import torch

from kanlm.kan.bases import tanh


def test_values_and_slopes() -> None:
    x = torch.cat([torch.linspace(-12, 12, 100_001), torch.logspace(-30, 4, 1001)])
    exact = torch.tanh(x.double())
    x.requires_grad_()
    y = tanh._Tanh.apply(x)
    y.sum().backward()
    torch.testing.assert_close(y.detach().double(), exact, rtol=4e-7, atol=0)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), 1 - exact**2, rtol=0, atol=8e-7)


def test_what_is_no_number_stays_none() -> None:
    assert tanh._Tanh.apply(torch.tensor(float("nan"))).isnan()


def test_compiled_code_takes_it() -> None:
    """Without a break in the graph, and with the library's values and slopes."""
    x = torch.randn(50, 33, requires_grad=True)
    squashed = torch.compile(lambda x: tanh.squashed(x, 3.0), fullgraph=True)
    got, expected = squashed(x), 3 * torch.tanh(x / 3)
    torch.testing.assert_close(got, expected, rtol=6e-7, atol=0)
    slopes = [torch.autograd.grad(y.sum(), x)[0] for y in (got, expected)]
    torch.testing.assert_close(*slopes, rtol=0, atol=8e-7)
