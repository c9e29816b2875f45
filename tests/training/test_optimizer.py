import pytest
import torch
from torch import nn

from kanlm.config import OptimizerSettings
from kanlm.training.optimizer import (
    build_optimizer,
    check_coverage,
    parameter_groups,
    set_learning_rate,
)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.layer = nn.Linear(4, 3)
        self.coefficients = nn.Parameter(torch.zeros(3, 2, 3))
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def test_groups_name_every_trainable_parameter_once():
    model = Model()
    groups = {group["name"]: group for group in parameter_groups(model, OptimizerSettings())}
    named = {id(p): name for name, p in model.named_parameters()}
    names = {key: {named[id(p)] for p in group["params"]} for key, group in groups.items()}
    assert names == {
        "matrices": {"embedding.weight", "layer.weight"},
        "coefficients": {"coefficients"},
        "vectors": {"layer.bias"},
    }


def test_coefficients_have_their_own_rate_and_decay():
    settings = OptimizerSettings(
        learning_rate=1.0,
        weight_decay=0.3,
        coefficients_learning_rate_ratio=0.5,
        coefficients_weight_decay=0.7,
    )
    optimizer = build_optimizer(Model(), settings)
    set_learning_rate(optimizer, 0.01)
    found = {g["name"]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert found == {"matrices": (0.01, 0.3), "coefficients": (0.005, 0.7), "vectors": (0.01, 0.0)}


def test_a_parameter_left_out_is_named():
    model = Model()
    groups = parameter_groups(model, OptimizerSettings())
    groups[0]["params"] = [p for p in groups[0]["params"] if p is not model.layer.weight]
    with pytest.raises(RuntimeError, match=r"layer\.weight"):
        check_coverage(model, groups)


def test_a_parameter_in_two_groups_is_named():
    model = Model()
    groups = parameter_groups(model, OptimizerSettings())
    groups[1]["params"].append(model.layer.bias)
    with pytest.raises(RuntimeError, match=r"layer\.bias"):
        check_coverage(model, groups)


def test_adamw_moves_as_the_paper_says():
    """One step of Loshchilov & Hutter's algorithm 2, worked out by hand."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    optimizer = build_optimizer(model, OptimizerSettings(learning_rate=0.1, weight_decay=0.5))
    model.weight.grad = torch.tensor([[3.0]])
    optimizer.step()
    # The first bias-corrected step is lr·sign(g); decay takes lr·0.5·2 first.
    assert model.weight.item() == pytest.approx(2.0 - 0.1 * 0.5 * 2.0 - 0.1, abs=1e-6)
