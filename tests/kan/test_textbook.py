"""Two claims of the KAN paper (Liu et al., arXiv 2404.19756): sections 2.4 and 3.5."""

import math
from collections.abc import Callable
from statistics import mean

import pytest
import torch
from torch import Tensor, nn

from kanlm.kan import BSpline, KANLinear, adapt_layer, refine_layer


def rms(y: Tensor) -> float:
    return y.detach().square().mean().sqrt().item()


def fit_by_lbfgs(network: nn.Module, x: Tensor, y: Tensor, iterations: int) -> None:
    optimizer = torch.optim.LBFGS(
        network.parameters(), max_iter=iterations, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (network(x) - y).square().mean()
        value.backward()
        return value

    optimizer.step(loss)


def test_refinement_fits_a_formula_ever_better() -> None:
    """A [2, 5, 1] KAN for exp(sin πx + y²) on the square: grids 5 → 10 → 20 → 40."""
    torch.manual_seed(1)
    layers = [
        KANLinear(2, 5, basis=BSpline(grid_size=5, degree=3, grid_range=(-1, 1))),
        KANLinear(5, 1, basis=BSpline(grid_size=5, degree=3, grid_range=(-2, 2))),
    ]
    network = nn.Sequential(*layers).double()

    def target(x: Tensor) -> Tensor:
        return torch.exp(torch.sin(math.pi * x[:, :1]) + x[:, 1:].square())

    x, unseen = (2 * torch.rand(1000, 2, dtype=torch.float64) - 1 for _ in range(2))
    fit_by_lbfgs(network, x, target(x), iterations=30)
    adapt_layer(layers[1], layers[0](x), tail=0.0, margin=0.1)
    errors = []
    for grid_size in (5, 10, 20, 40):
        if grid_size > 5:
            for layer in layers:
                refine_layer(layer, grid_size)
            # The finer network starts where the coarser ended.
            assert rms(network(x) - target(x)) == pytest.approx(errors[-1], rel=1e-6)
        fit_by_lbfgs(network, x, target(x), iterations=100)
        errors.append(rms(network(x) - target(x)))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert rms(network(unseen) - target(unseen)) < 1e-3


CENTERS = (-0.8, -0.4, 0.0, 0.4, 0.8)


def peaks(x: Tensor) -> Tensor:
    """Five Gaussians side by side."""
    return torch.stack([torch.exp(-300 * (x - c).square()) for c in CENTERS]).sum(dim=0)


def errors_after_each_peak(network: nn.Module, learning_rate: float) -> list[list[float]]:
    """Show one peak after another; row p has every peak's RMS error after peak p."""
    parts = [torch.linspace(c - 0.2, c + 0.2, 100).unsqueeze(-1) for c in CENTERS]
    rows = []
    for part in parts:
        optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
        for _ in range(300):
            optimizer.zero_grad()
            (network(part) - peaks(part)).square().mean().backward()
            optimizer.step()
        rows.append([rms(network(x) - peaks(x)) for x in parts])
    return rows


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(1, 14), nn.Tanh(), nn.Linear(14, 14), nn.Tanh(), nn.Linear(14, 1)
    )


@pytest.mark.parametrize(
    ("make", "learning_rate", "keeps"),
    [
        (
            lambda: KANLinear(
                1,
                1,
                basis=BSpline(grid_size=200, degree=3, grid_range=(-1.0, 1.0)),
                base=None,
                start="zero",
            ),
            2e-2,
            True,
        ),
        (mlp, 2e-2, False),
    ],
    ids=["kan", "mlp"],
)
def test_a_local_basis_keeps_old_peaks(
    make: Callable[[], nn.Module], learning_rate: float, keeps: bool
) -> None:
    """Both have about 200 parameters and learn the peaks when they are shown."""
    torch.manual_seed(0)
    network = make()
    assert 200 < sum(p.numel() for p in network.parameters()) < 260
    rows = errors_after_each_peak(network, learning_rate)
    nothing = rms(peaks(torch.linspace(-0.2, 0.2, 100)))
    learned = [rows[p][p] for p in range(len(CENTERS))]
    assert mean(learned) < 0.25 * nothing
    forgotten = rows[-1][:-1]
    if keeps:
        assert max(forgotten) < 0.05 * nothing
    else:
        assert mean(forgotten) > 0.5 * nothing
