"""Knot insertion against scipy's, and against splines evaluated on both sequences."""

import numpy as np
import pytest
import torch
from scipy import interpolate

from kanlm.kan.knots import equally_spaced, extended, insertion_matrix, split

DEGREES = (0, 1, 2, 3, 4, 5)


def random_knots(rows: int, count: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(count)
    return (torch.rand(rows, count, generator=draw, dtype=torch.float64) + 0.1).cumsum(dim=1)


@pytest.mark.parametrize("degree", DEGREES[1:])  # scipy inserts into no steps
def test_one_inserted_knot_is_scipys(degree: int) -> None:
    knots = random_knots(1, 6 + 2 * degree)
    count = knots.shape[1] - degree - 1
    new = float(knots[0, degree + 2] * 0.3 + knots[0, degree + 3] * 0.7)
    fine = torch.cat([knots, knots.new_tensor([[new]])], dim=1).sort(dim=1).values
    ours = insertion_matrix(knots, fine, degree)[0]
    for b in range(count):
        spline = interpolate.BSpline(knots[0].numpy(), np.eye(count)[b], degree).insert_knot(new)
        np.testing.assert_allclose(spline.t, fine[0], atol=1e-14)
        np.testing.assert_allclose(ours[:, b], spline.c[: count + 1], atol=1e-13)


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_split_cells_hold_the_same_splines(degree: int, parts: int) -> None:
    knots = random_knots(2, 5 + 2 * degree)
    fine = split(knots, parts)
    matrix = insertion_matrix(knots, fine, degree)
    assert (matrix >= 0).all()
    for row in range(2):
        old, new = knots[row].numpy(), fine[row].numpy()
        assert set(old) <= set(new)
        x = np.linspace(old[degree], old[-degree - 1], 200)
        here = interpolate.BSpline(old, np.eye(len(old) - degree - 1), degree)(x)
        there = interpolate.BSpline(new, matrix[row].numpy(), degree)(x)
        np.testing.assert_allclose(there, here, atol=1e-13)


def test_subdivision_of_equal_cells_is_the_textbooks() -> None:
    """Lane and Riesenfeld's masks: rows of Pascal's triangle over 2^degree."""
    for degree, mask in ((1, [1, 2, 1]), (2, [1, 3, 3, 1]), (3, [1, 4, 6, 4, 1])):
        knots = torch.arange(12.0, dtype=torch.float64).unsqueeze(0)
        column = insertion_matrix(knots, split(knots, 2), degree)[0, :, 3]
        assert column[column > 0].tolist() == [m / 2**degree for m in mask]


def test_equal_cells_have_exact_ends() -> None:
    ends = torch.tensor([[-0.7, 2.1], [1.0, 1.3]])
    knots = equally_spaced(ends, 7, 2)
    assert torch.equal(knots[:, 2], ends[:, 0])
    assert torch.equal(knots[:, -3], ends[:, 1])
    np.testing.assert_allclose(knots.diff(), (ends.diff() / 7).expand(2, 11), rtol=1e-5)
    torch.testing.assert_close(extended(knots[:, 2:-2], 2), knots)
