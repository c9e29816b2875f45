"""Occupancy against counts and means made by hand."""

import pytest
import torch

from kanlm.kan import BSpline, Chebyshev, Fourier, Occupancy


def test_counts_by_hand() -> None:
    """Two cells on [0, 2] and three hats."""
    basis = BSpline(grid_size=2, grid_range=(0.0, 2.0))
    occupancy = Occupancy(basis, 2)
    occupancy.update(torch.tensor([[0.0, -5.0], [0.5, 5.0], [2.0, 2.5], [2.1, 1.0]]))
    assert occupancy.in_range.tolist() == [0.75, 0.25]
    squares = torch.tensor([[1.0 + 0.25, 0.25, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(occupancy.sums[:, 2:], squares)
    torch.testing.assert_close(occupancy.use, squares / squares.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("make", [BSpline, Chebyshev, Fourier])
def test_sums_of_parts_are_those_of_the_whole(make) -> None:
    basis, x = make(), 3 * torch.randn(4, 25, 3)
    whole, one, other = (Occupancy(basis, 3) for _ in range(3))
    whole.update(x)
    one.update(x[:1])
    other.update(x[1:])
    one.merge(other)
    torch.testing.assert_close(one.sums, whole.sums)
    torch.testing.assert_close(whole.use.sum(dim=1), torch.ones(3, dtype=torch.float64))
    low, high = basis.ends[0].tolist()
    expected = ((x >= low) & (x <= high)).double().mean(dim=(0, 1))
    torch.testing.assert_close(whole.in_range, expected)


def test_every_channel_has_its_own_range() -> None:
    basis = BSpline(grid_size=2).with_grid(torch.tensor([[0.0, 1.0, 2.0], [10.0, 11.0, 12.0]]))
    occupancy = Occupancy(basis, 2)
    occupancy.update(torch.tensor([[1.0, 11.5], [1.5, 1.5], [11.0, 1e6]]))
    assert occupancy.in_range.tolist() == [2 / 3, 1 / 3]
    assert torch.isfinite(occupancy.sums).all()


def test_nothing_seen() -> None:
    occupancy = Occupancy(BSpline(grid_size=2), 1)
    occupancy.update(torch.empty(0, 1))
    assert occupancy.in_range.tolist() == [1.0]
    assert occupancy.use.tolist() == [[0.0, 0.0, 0.0]]


def test_uniform_inputs_use_inner_functions_alike() -> None:
    basis = BSpline(degree=3, grid_size=10)
    occupancy = Occupancy(basis, 1)
    occupancy.update(torch.linspace(-3, 3, 5001, dtype=torch.float64).unsqueeze(-1))
    inner = occupancy.use[0, 3:-3]
    assert (inner - inner.mean()).abs().max() < 1e-3 * inner.mean()
