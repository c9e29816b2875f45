"""Parity with pykan, of the paper that KANs are from; `pip install 'kanlm[bench]'` brings it."""

from typing import Any

import pytest
import torch

from kanlm.kan import BSpline, KANLinear

# pykan's package is called `kan`, as this folder is.
KANLayer = pytest.importorskip("kan.KANLayer").KANLayer


def ours(theirs: Any) -> KANLinear:
    """A KANLinear with a pykan layer's knots and coefficients."""
    layer = KANLinear(
        theirs.in_dim,
        theirs.out_dim,
        basis=BSpline(
            theirs.in_dim,
            grid_size=theirs.num,
            degree=theirs.k,
            equal_cells=False,
            per_channel=True,
        ),
    )
    scale = theirs.scale_sp * theirs.mask
    with torch.no_grad():
        layer.basis.get_buffer("knots").copy_(theirs.grid)
        layer.coefficients.copy_((theirs.coef * scale.unsqueeze(-1)).transpose(1, 2))
        layer.get_parameter("base_weight").copy_((theirs.scale_base * theirs.mask).T)
    return layer


@pytest.mark.parametrize("degree", [1, 2, 3, 5])
@pytest.mark.parametrize("adapted", [False, True])
def test_the_same_coefficients_give_the_same_outputs(degree: int, adapted: bool) -> None:
    """In float32 on pykan's grid; beyond it pykan's splines vanish, and ours go on."""
    torch.manual_seed(0)
    theirs = KANLayer(4, 3, num=6, k=degree, noise_scale=2.0, sparse_init=True)
    x = torch.randn(400, 4).clamp(-3, 3)
    if adapted:  # free knots, a grid of its own for each input
        theirs.update_grid_from_samples(x)
    low, high = theirs.grid[:, degree], theirs.grid[:, -degree - 1]
    share = torch.rand(500, 4)
    inside = torch.lerp(low, high, 0.001 + 0.998 * share).detach()
    expected = theirs(inside)[0]
    assert expected.abs().mean() > 0.05
    torch.testing.assert_close(ours(theirs)(inside), expected, rtol=1e-5, atol=1e-5)


def test_grids_of_equal_cells_are_pykans() -> None:
    theirs = KANLayer(2, 2, num=8, k=3, grid_range=[-2, 1])
    basis = BSpline(grid_size=8, degree=3, grid_range=(-2.0, 1.0))
    torch.testing.assert_close(basis.knots.expand(2, -1), theirs.grid.data)
