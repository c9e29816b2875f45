"""Lengths of updates, and the time that phases take."""

import time

import pytest
import torch
from torch import nn

from kanlm.training.phases import Phases
from kanlm.training.updates import measured_update


def test_an_update_is_as_long_as_its_parameters_have_moved():
    torch.manual_seed(0)
    first, second = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(5))
    groups = [{"params": [first], "name": "matrices"}, {"params": [second], "name": "vectors"}]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    first.grad, second.grad = torch.randn(3, 2), torch.randn(5)
    with measured_update(optimizer) as norms:
        optimizer.step()
    expected = {
        "update_norm/matrices": 0.5 * first.grad.norm().item(),
        "update_norm/vectors": 0.5 * second.grad.norm().item(),
    }
    total = 0.5 * torch.cat([first.grad.flatten(), second.grad]).norm().item()
    found = {name: norm.item() for name, norm in norms.items()}
    assert found == pytest.approx({**expected, "update_norm": total})


def test_phases_add_up_and_start_again():
    phases = Phases(torch.device("cpu"))
    for _ in range(2):
        with phases.of("data"):
            time.sleep(0.01)
    found = phases.read()
    assert list(found) == ["phase_seconds/data"]
    assert 0.02 <= found["phase_seconds/data"] < 0.5
    assert phases.read() == {}
