"""Muon beside torch's own, and its iteration beside the singular value decomposition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kanlm.training.muon import Muon, orthogonalized


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9), (1, 5)])
def test_matrices_move_as_by_torch_bit_for_bit(shape: tuple[int, int]):
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().clone())
    own = Muon([{"params": [ours], "weight_decay": 0.1}], lr=0.02)
    torchs = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        own.step()
        torchs.step()
    assert torch.equal(ours, theirs)


def test_coefficients_move_as_the_matrix_that_they_are():
    torch.manual_seed(0)
    edges = nn.Parameter(torch.randn(3, 2, 5))
    matrix = nn.Parameter(edges.detach().flatten(0, 1).T.clone())
    edges.grad = torch.randn(3, 2, 5)
    matrix.grad = edges.grad.flatten(0, 1).T.clone()
    for parameter in (edges, matrix):
        Muon([{"params": [parameter], "weight_decay": 0.1}], lr=0.02).step()
    torch.testing.assert_close(edges.flatten(0, 1).T, matrix, rtol=1e-2, atol=1e-4)


@settings(max_examples=20)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(1e-4, 1e4), st.integers(0, 99))
def test_singular_vectors_stay_and_values_come_near_one(m: int, n: int, scale: float, seed: int):
    matrix = scale * torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    turned = left.T @ orthogonalized(matrix).double() @ right.T
    # Smaller values than this need more steps than five.
    near = values > 0.02 * values.norm()
    assert ((turned.diagonal() - 1).abs()[near] < 0.4).all()
    assert (turned - turned.diagonal().diag()).abs().max() < 0.1


def test_a_parameter_without_gradient_stays():
    parameter = nn.Parameter(torch.ones(2, 2))
    Muon([{"params": [parameter]}], lr=1.0).step()
    assert torch.equal(parameter, torch.ones(2, 2))
