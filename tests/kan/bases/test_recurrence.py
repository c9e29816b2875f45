"""The compiled recurrences against the bases' own formulas in float64."""

import pytest
import torch

from kanlm.kan import Chebyshev, Hermite, Legendre, cpp_build

pytestmark = pytest.mark.skipif(
    cpp_build.obstacle() is not None, reason=f"no native kernels: {cpp_build.obstacle()}"
)


@pytest.mark.parametrize("kind", [Hermite, Chebyshev, Legendre])
@pytest.mark.parametrize("outside", ["linear", "squash"])
@pytest.mark.parametrize("degree", [1, 2, 3, 7])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("shape", [(1, 5), (0, 5), (40, 33), (3, 17)])
def test_values_and_slopes(kind, outside, degree, constant, shape) -> None:
    """In the range, at its ends and in the tails."""
    basis = kind(degree=degree, constant=constant, outside=outside, half_width=2.0)
    x = 2 * torch.randn(*shape, dtype=torch.float64)
    x.view(-1)[:3] = torch.tensor([-2.0, 2.0, 0.0], dtype=torch.float64)[: x.numel()]
    assert basis.cpp_formulas().can(x.float())
    # tanh is off by 4e-7, and a polynomial of degree n rises by n² of its maximum (Markov).
    atol = max(4e-6, 4e-7 * degree**2) if outside == "squash" else 4e-6
    values = torch.full((x.shape[0], basis.num_functions + 1, x.shape[1]), 7.0)
    basis.write_values(x.float(), values[:, :-1])
    assert (values[:, -1] == 7).all()
    values = values[:, :-1].transpose(-1, -2)
    expected = basis.values(x)
    scale = 1 + expected.abs().amax() if x.numel() else 1
    assert values.shape == expected.shape
    torch.testing.assert_close(values.double() / scale, expected / scale, rtol=0, atol=atol)
    gradients = torch.randn(*shape[:-1], basis.num_functions, shape[-1], dtype=torch.float64)
    dx = (gradients.transpose(-1, -2) * basis.derivatives(x)).sum(-1)
    scale = 1 + dx.abs().amax() if x.numel() else 1
    got = basis.pull_back(x.float(), gradients.float())
    torch.testing.assert_close(got.double() / scale, dx / scale, rtol=0, atol=atol)


def test_inputs_and_gradients_that_do_not_lie_in_order() -> None:
    basis = Hermite()
    x = torch.randn(9, 4).T
    gradients = torch.randn(4, 9, 3).transpose(-1, -2)
    values = torch.empty(4, 3, 9)
    basis.write_values(x, values)
    torch.testing.assert_close(values.mT, basis.values(x), rtol=1e-5, atol=1e-5)
    expected = (gradients.mT * basis.derivatives(x)).sum(-1)
    torch.testing.assert_close(basis.pull_back(x, gradients), expected, rtol=1e-5, atol=1e-5)


def test_other_dtypes_take_the_formulas() -> None:
    formulas = Hermite().cpp_formulas()
    assert formulas is not None
    assert not formulas.can(torch.zeros(2, dtype=torch.float64))
    assert not formulas.can(torch.zeros(2, dtype=torch.bfloat16))
