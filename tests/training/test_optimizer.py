import copy

import pytest
import torch
from torch import nn

from kanlm.config import OptimizerSettings
from kanlm.errors import UserError
from kanlm.kan import KANLinear, Rational, Wavelet
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.settings import ModelSettings
from kanlm.training.optimizer import (
    build_optimizer,
    check_coverage,
    learning_rates,
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


class Edges(nn.Module):
    """Everything that Muon could be given, and must or must not be."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.edge = KANLinear(4, 3, basis=Wavelet(4, wavelets=2))
        self.convolution = nn.Conv1d(3, 3, 2, bias=False)
        self.shared = nn.Module()
        self.shared.register_parameter("coefficients", nn.Parameter(torch.zeros(4, 2, 1)))


def names(model: nn.Module, settings: OptimizerSettings) -> dict[str, set[str]]:
    named = {id(p): name for name, p in model.named_parameters()}
    return {
        group["name"]: {named[id(p)] for p in group["params"]}
        for group in parameter_groups(model, settings)
    }


def test_what_a_basis_owns_has_a_group_of_its_own():
    assert names(Edges(), OptimizerSettings()) == {
        "matrices": {"embedding.weight", "edge.base_weight", "convolution.weight"},
        "coefficients": {"edge.coefficients", "shared.coefficients"},
        "basis": {"edge.basis.translations", "edge.basis.log_scales"},
        "vectors": {"edge.bias"},
    }


def test_a_basis_is_undecayed_and_has_its_own_rate():
    model = KANLinear(3, 2, basis=Rational(3))
    settings = OptimizerSettings(learning_rate=1.0, basis_learning_rate_ratio=0.1)
    optimizer = build_optimizer(model, settings)
    set_learning_rate(optimizer, 0.5)
    [group] = [g for g in optimizer.param_groups if g["name"] == "basis"]
    assert (group["lr"], group["weight_decay"]) == (0.05, 0.0)


def test_muon_has_hidden_matrices_and_coefficients_of_edges_where_asked():
    everything = {
        "matrices": {"embedding.weight", "convolution.weight"},
        "hidden": {"edge.base_weight"},
        "coefficients": {"edge.coefficients", "shared.coefficients"},
        "basis": {"edge.basis.translations", "edge.basis.log_scales"},
        "vectors": {"edge.bias"},
    }
    assert names(Edges(), OptimizerSettings(kind="muon")) == everything
    everything["coefficients"] = {"shared.coefficients"}
    everything["hidden_coefficients"] = {"edge.coefficients"}
    settings = OptimizerSettings(kind="muon", muon_coefficients=True)
    assert names(Edges(), settings) == everything


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_of_a_language_model_are_adamws(tied: bool):
    shape = ModelSettings(
        d_model=8,
        n_layers=1,
        n_heads=2,
        tie_embeddings=tied,
        feed_forward={"kind": "gelu", "hidden": 8},
    )
    model = KanLMForCausalLM(KanLMConfig.from_settings(shape, 11))
    found = names(model, OptimizerSettings(kind="muon"))
    tables = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert found["matrices"] == tables
    assert {name.split(".")[-2] for name in found["hidden"]} >= {"q_proj", "o_proj"}


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


def test_muon_moves_as_the_paper_says():
    """The gradient's singular values all become about 1, times Moonshot's scale."""
    torch.manual_seed(0)
    model = Edges()
    settings = OptimizerSettings(
        kind="muon", learning_rate=0.1, muon_learning_rate=0.03, muon_coefficients=True
    )
    optimizer = build_optimizer(model, settings)
    set_learning_rate(optimizer, 0.1)
    before, after = {}, {}
    for name, parameter in model.named_parameters():
        parameter.grad = torch.randn_like(parameter)
        before[name] = parameter.detach().clone()
    optimizer.step()
    for name, parameter in model.named_parameters():
        after[name] = parameter.detach()

    for name in ("edge.base_weight", "edge.coefficients"):
        weight, gradient = before[name], model.get_parameter(name).grad
        assert gradient is not None
        moved = (after[name] - weight * (1 - 0.03 * 0.1)).reshape(-1, weight.shape[-1])
        u, _, v = torch.linalg.svd(gradient.reshape(moved.shape), full_matrices=False)
        along = u.T @ moved @ v.T / (-0.03 * 0.2 * max(moved.shape) ** 0.5)
        assert along.diag().min() > 0.5
        assert along.diag().max() < 1.5
        torch.testing.assert_close(along, along.diag().diag(), rtol=0, atol=0.1)
    # AdamW's first step is the sign of the gradient.
    bias, gradient = before["edge.bias"], model.get_parameter("edge.bias").grad
    assert gradient is not None
    torch.testing.assert_close(after["edge.bias"], bias - 0.1 * gradient.sign())


def test_muon_goes_on_bit_for_bit_from_a_saved_state():
    """Loading makes new groups, which both parts must then follow."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for parameter in model.parameters():
            parameter.grad = parameter.detach().cos()
        optimizer.step()
        optimizer.zero_grad()

    settings = OptimizerSettings(kind="muon", muon_coefficients=True)
    torch.manual_seed(0)
    model = Edges()
    optimizer = build_optimizer(model, settings)
    step(model, optimizer)
    other = Edges()
    other.load_state_dict(model.state_dict())
    resumed = build_optimizer(other, settings)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for rate in (0.1, 0.02):
        for each in (optimizer, resumed):
            set_learning_rate(each, rate)
        step(model, optimizer)
        step(other, resumed)
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert len(resumed.state) == len(list(other.parameters()))


def test_muon_needs_a_matrix():
    with pytest.raises(UserError, match=r"optimizer\.kind = muon: the model has no hidden matrix"):
        build_optimizer(nn.Embedding(3, 2), OptimizerSettings(kind="muon"))


def test_rates_are_named_where_they_differ():
    optimizer = build_optimizer(Model(), OptimizerSettings(learning_rate=1.0))
    set_learning_rate(optimizer, 0.5)
    assert learning_rates(optimizer) == {"learning_rate": 0.5}
    settings = OptimizerSettings(learning_rate=1.0, coefficients_learning_rate_ratio=0.5)
    optimizer = build_optimizer(Model(), settings)
    set_learning_rate(optimizer, 0.5)
    assert learning_rates(optimizer) == {
        "learning_rate": 0.5,
        "learning_rate/coefficients": 0.25,
    }
