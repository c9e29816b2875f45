"""The compiled Gaussians against numpy's exponentials in float64."""

import numpy as np
import pytest
import torch

from kanlm.kan import RBF, cpp_build

pytestmark = pytest.mark.skipif(
    cpp_build.obstacle() is not None, reason=f"no native kernels: {cpp_build.obstacle()}"
)


def takes(basis: RBF, x: torch.Tensor) -> bool:
    formulas = basis.cpp_formulas()
    return formulas is not None and formulas.can(x)


def expected(x: np.ndarray, centers: int, width: float, limit: float):
    """Values and slopes, (N, B, in), the tails linear."""
    places = np.linspace(-limit, limit, centers)[:, None]
    reach = width * (places[1] - places[0])
    inside = np.clip(x, -limit, limit)[:, None]
    values = np.exp(-(((inside - places) / reach) ** 2))
    slopes = -2 * (inside - places) / reach**2 * values
    return values + slopes * (x[:, None] - inside), slopes


@pytest.mark.parametrize("centers", [2, 7, 12])
@pytest.mark.parametrize("width", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(1, 5), (0, 5), (40, 33), (3, 17)])
def test_values_and_slopes(centers: int, width: float, shape: tuple[int, int]) -> None:
    """In the range, at its ends, in the tails, and where the exponential is nothing."""
    basis = RBF(centers=centers, width=width, half_width=2.0)
    x = 2 * torch.randn(*shape)
    x.view(-1)[:4] = torch.tensor([-2.0, 2.0, 0.0, 9.0])[: x.numel()]
    assert takes(basis, x)
    values, slopes = expected(x.double().numpy(), centers, width, 2.0)
    to = torch.full((shape[0], centers + 1, shape[1]), 7.0)
    basis.write_values(x, to[:, :-1])
    assert (to[:, -1] == 7).all()
    scale = 1 + np.abs(values).max(initial=0)
    # A distance of float32 counts for more the narrower a function is.
    atol = 4e-6 / min(width, 1)
    np.testing.assert_allclose(to[:, :-1] / scale, values / scale, rtol=0, atol=atol)
    gradients = torch.randn(shape[0], centers, shape[1])
    dx = (gradients.double().numpy() * slopes).sum(1)
    scale = 1 + np.abs(slopes).max(initial=0)
    got = basis.pull_back(x, gradients)
    np.testing.assert_allclose(got / scale, dx / scale, rtol=0, atol=atol)


def test_the_exponential_is_right_to_a_few_last_bits() -> None:
    """Centres far enough apart that one Gaussian takes the whole range of exponents."""
    basis = RBF(centers=2, half_width=20.0, width=0.1)
    x = torch.linspace(-20, 16, 100_001).unsqueeze(1)
    values = torch.empty(len(x), 2, 1)
    basis.write_values(x, values)
    exact = np.exp(-(((x.double().numpy() + 20) / 4.0) ** 2))
    large = exact > 1e-30
    error = np.abs(values[:, 0].double().numpy() - exact) / exact
    # An exponent of up to 69 out of a distance of 24 bits is off by several times 4e-6.
    assert error[large].max() < 3e-5
    assert error[exact > 0.3].max() < 6e-7


def test_not_a_number_stays_one() -> None:
    values = torch.empty(1, 7, 2)
    RBF().write_values(torch.tensor([[float("nan"), 0.5]]), values)
    assert values[..., 0].isnan().all()
    assert not values[..., 1].isnan().any()


def test_what_it_has_not_takes_the_formulas() -> None:
    """Hats, bent inputs and other dtypes."""
    x = torch.randn(5, 3)
    for basis in (RBF(shape="hat"), RBF(outside="squash")):
        to = torch.empty(5, 7, 3)
        basis.write_values(x, to)
        torch.testing.assert_close(to.mT, basis.values(x), rtol=1e-5, atol=1e-6)
        assert basis.cpp_formulas() is None
    assert not takes(RBF(), x.double())
    assert not takes(RBF(), x.bfloat16())
