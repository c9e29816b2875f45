"""Experts against transformers' Mixtral and against hand-made routings."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import (
    MixtralSparseMoeBlock,
    load_balancing_loss_func,
)

from kanlm.model.feed_forward import (
    KAN,
    Context,
    MoE,
    SwiGLU,
    complete_feed_forward,
    make_feed_forward,
)
from kanlm.model.matching import feed_forward_cost, solve_hidden, twin
from kanlm.model.settings import ModelSettings

SWIGLU = [{"kind": "swiglu"}]


def moe(d_model: int = 8, hidden: int = 6, output_scale: float = 1.0, **options: Any) -> MoE:
    torch.manual_seed(0)
    spec = {"kind": "moe", "hidden": hidden, "experts": SWIGLU, "num_experts": 4, **options}
    block = make_feed_forward(spec, d_model, output_scale)
    assert isinstance(block, MoE)
    return block


def with_router(block: MoE, weight: torch.Tensor) -> MoE:
    with torch.no_grad():
        block.router.weight.copy_(weight)
    return block


def auxiliary_loss(block: MoE, x: torch.Tensor, present: torch.Tensor | None = None):
    context = Context(layer=0, present=present)
    block.train()(x, context)
    (loss,) = context.auxiliary_losses
    return loss


@pytest.mark.parametrize("top_k", [2, 3])
def test_with_swiglu_experts_it_is_a_mixtral(top_k: int) -> None:
    ours = moe(top_k=top_k).eval()
    with_router(ours, torch.randn(4, 8))
    experts = [expert for expert in ours.experts if isinstance(expert, SwiGLU)]
    config = MixtralConfig(
        hidden_size=8, intermediate_size=6, num_local_experts=4, num_experts_per_tok=top_k
    )
    config._experts_implementation = "eager"
    theirs = MixtralSparseMoeBlock(config).eval()
    theirs.load_state_dict(
        {
            "gate.weight": ours.router.weight,
            "experts.gate_up_proj": torch.stack(
                [torch.cat([e.gate.weight, e.up.weight]) for e in experts]
            ),
            "experts.down_proj": torch.stack([e.down.weight for e in experts]),
        }
    )
    x = torch.randn(2, 11, 8)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("present", [None, torch.tensor([[False] * 3 + [True] * 8, [True] * 11])])
def test_auxiliary_losses_are_those_of_the_papers(present: torch.Tensor | None) -> None:
    x = torch.randn(2, 11, 8)
    block = with_router(moe(balance_loss=1.0, router_z_loss=0.0), torch.randn(4, 8))
    logits = x @ block.router.weight.T
    # Mixtral sums over the choices what Switch says of one.
    expected = load_balancing_loss_func((logits.flatten(0, 1),), 4, 2, present) / 2
    torch.testing.assert_close(auxiliary_loss(block, x, present), expected)

    block.balance_loss, block.router_z_loss = 0.0, 0.5
    tokens = logits if present is None else logits[present]
    z = tokens.exp().sum(-1).log().square().mean()
    torch.testing.assert_close(auxiliary_loss(block, x, present), 0.5 * z)


def test_the_balance_loss_is_least_where_loads_are_even() -> None:
    block = moe(top_k=1, balance_loss=1.0, router_z_loss=0.0)
    with_router(block, 20 * torch.eye(4, 8))
    even = torch.eye(4, 8).repeat(3, 1)
    assert auxiliary_loss(block, even).item() == pytest.approx(1, abs=1e-6)
    uneven = torch.eye(4, 8)[[0, 0, 0, 1]]
    expected = 4 * (0.75**2 + 0.25**2)
    assert auxiliary_loss(block, uneven).item() == pytest.approx(expected, abs=1e-6)


def test_a_single_expert_has_gate_one_and_still_teaches_the_router() -> None:
    block = moe(top_k=1).eval()
    x = torch.randn(5, 8)
    logits = x @ block.router.weight.T
    expected = torch.stack(
        [block.experts[int(best)](row) for row, best in zip(x, logits.argmax(-1), strict=True)]
    )
    torch.testing.assert_close(block(x), expected)
    (found,) = torch.autograd.grad(block(x).square().sum(), [block.router.weight])
    weighted = logits.log_softmax(-1).max(-1).values * 2 * expected.square().sum(-1).detach()
    (gradient,) = torch.autograd.grad(weighted.sum(), [block.router.weight])
    torch.testing.assert_close(found, gradient)


@pytest.mark.parametrize("experts", [SWIGLU, [{"kind": "kan"}, {"kind": "gelu"}]])
def test_room_for_all_equals_no_capacity_equals_every_expert_on_all_tokens(experts: list) -> None:
    block = moe(experts=experts, capacity_factor=2.0)
    x = torch.randn(3, 10, 8)
    assert block.capacity(10) == 10
    expected = block.eval()(x)
    torch.testing.assert_close(block.train()(x), expected)
    block.capacity_factor = None
    torch.testing.assert_close(block(x), expected)
    probabilities = block.router(x).softmax(-1)
    torch.testing.assert_close(block._on_all(x, block._choose(probabilities)[0]), expected)


def test_the_earliest_tokens_of_a_sequence_fill_an_expert() -> None:
    block = moe(top_k=1, capacity_factor=1.0)
    # All tokens of the first row want expert 0, those of the second one expert each.
    with_router(block, torch.eye(4, 8))
    x = torch.stack([torch.eye(4, 8)[[0] * 8], torch.eye(4, 8).repeat(2, 1)])
    undropped = block.eval()(x)
    dropped = block.train()(x)
    torch.testing.assert_close(dropped[0, :2], undropped[0, :2])
    assert (dropped[0, 2:] == 0).all()
    torch.testing.assert_close(dropped[1], undropped[1])


def test_padding_takes_nobodys_place() -> None:
    block = with_router(moe(top_k=1, capacity_factor=1.0), torch.eye(4, 8)).train()
    x = torch.eye(4, 8)[[0] * 8].unsqueeze(0)
    present = torch.tensor([[False] * 5 + [True] * 3])
    y = block(x, Context(layer=0, present=present))
    assert (y[0] != 0).any(-1).tolist() == [False] * 5 + [True] * 2 + [False]


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 11), st.sampled_from([0.3, 0.7, 1.0, 1.5]))
def test_drops_depend_on_no_later_token_and_no_other_row(seed: int, t: int, factor: float) -> None:
    block = moe(capacity_factor=factor).train()
    x = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(seed))
    y = block(x)
    later = x.clone()
    later[:, t:] = torch.randn(12 - t, 8)
    torch.testing.assert_close(block(later)[:, :t], y[:, :t])
    torch.testing.assert_close(block(x[1:2]), y[1:2])


@pytest.mark.parametrize("width", [16, 64, 256])
@pytest.mark.parametrize("top_k", [1, 2])
def test_starts_with_the_output_variance_asked_for(width: int, top_k: int) -> None:
    spec = {"kind": "moe", "experts": [{"kind": "kan-local"}, {"kind": "swiglu"}], "top_k": top_k}
    hidden = solve_hidden(spec, width, parameters=32 * width**2)
    block = make_feed_forward({**spec, "hidden": hidden}, width, output_scale=0.5).eval()
    torch.manual_seed(0)
    squares = []
    for _ in range(max(3, 640 // width)):
        block.reset_parameters()
        x = F.rms_norm(torch.randn(64, width), (width,))
        with torch.no_grad():
            squares.append(block(x).square().mean())
    assert torch.stack(squares).mean().item() == pytest.approx(0.25, rel=0.1)


def test_mixed_experts_have_equally_many_parameters() -> None:
    block = moe(d_model=32, hidden=20, experts=[{"kind": "kan"}, {"kind": "swiglu"}])
    counts = [sum(p.numel() for p in expert.parameters()) for expert in block.experts]
    assert isinstance(block.experts[0], KAN)
    assert block.experts[0].hidden == 20
    assert counts[0] == counts[2]
    assert counts[1] == counts[3] == pytest.approx(counts[0], abs=3 * 32 / 2)
    assert block.label == "moe4-top2/kan/hermite3-squash+swiglu"


def test_matching_counts_all_parameters_and_active_flops() -> None:
    spec = {"kind": "moe", "experts": SWIGLU, "num_experts": 8, "top_k": 2}
    dense = ModelSettings(d_model=64, n_layers=2, feed_forward={"kind": "swiglu", "hidden": 256})
    target = {of: feed_forward_cost(dense.feed_forward_by_layer[0], 64, of) for of in COSTS}
    found = {of: twin(dense, spec, of).feed_forward_by_layer[0] for of in COSTS}
    for of in COSTS:
        assert feed_forward_cost(found[of], 64, of) == pytest.approx(target[of], rel=0.02)
    # A token is sent to a quarter of the experts: by FLOPs they may be four times as wide.
    assert found["flops"]["hidden"] / found["parameters"]["hidden"] == pytest.approx(4, rel=0.05)


COSTS = ("parameters", "flops")


def test_statistics_are_what_happened() -> None:
    block = with_router(moe(top_k=1, capacity_factor=1.0), 20 * torch.eye(4, 8)).train()
    x = torch.eye(4, 8)[[0, 0, 0, 1, 0, 0, 0, 2]].unsqueeze(0)
    block.start_counting()
    block(x)
    block.eval()(x)
    assert block.sums is not None
    logits = 20 * x[0, :, :4]
    entropy = torch.distributions.Categorical(logits=logits).entropy().sum().item()
    *counts, found = block.sums[[0, 1, 2, 3, 4, 6, 5]].tolist()
    assert counts == [6, 1, 1, 0, 4, 8]
    assert found == pytest.approx(entropy, rel=1e-5)
    once = block.figures(block.sums.tolist())
    assert once == {
        **{f"load_{expert}": share / 8 for expert, share in enumerate((6, 1, 1, 0))},
        "largest_over_mean_load": 3.0,
        "dropped": 0.5,
        "router_entropy": pytest.approx(entropy / 8, rel=1e-5),
    }
    block.train()(x)
    assert block.figures(block.sums.tolist()) == once
    block.start_counting()
    assert block.sums.tolist() == [0] * 7


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_experts_without_a_token_have_a_gradient_for_all_processes(capacity_factor) -> None:
    block = moe(experts=[{"kind": "kan"}], top_k=1, capacity_factor=capacity_factor).train()
    with_router(block, torch.eye(4, 8))
    block(torch.eye(4, 8)[[0] * 6]).sum().backward()
    assert all(p.grad is not None for p in block.parameters())
    unused = block.get_parameter("experts.3.down.coefficients").grad
    assert unused is not None
    assert not unused.any()


def test_among_processes_every_expert_is_called_always(tmp_path: Path) -> None:
    """One whose parameters are split among them is put together by all or by none."""
    block, called = moe(top_k=1).eval(), []
    for expert in block.experts:
        expert.register_forward_hook(lambda *_: called.append(1))
    x = torch.randn(1, 8)
    alone = block(x)
    assert len(called) == 1
    meeting = f"file://{tmp_path / 'meeting'}"
    distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        assert torch.equal(block(x), alone)
    finally:
        distributed.destroy_process_group()
    assert len(called) == 1 + block.num_experts


def test_the_router_is_never_narrowed() -> None:
    block = moe()
    x = torch.randn(2, 5, 8)
    expected = x @ block.router.weight.T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block.train()(x).dtype == torch.float32
        assert torch.equal(block.router(x), expected)
    assert block.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("training", [True, False])
def test_compiled_without_a_break_it_computes_and_counts_the_same(training: bool) -> None:
    block = moe(num_experts=2, top_k=1, experts=[{"kind": "kan"}]).train(training)
    block.start_counting()
    x = torch.randn(2, 12, 8)
    expected = block(x)
    assert block.sums is not None
    counted = block.sums.tolist()
    block.start_counting()
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    assert block.sums.tolist() == pytest.approx(counted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": []}, "num_experts = 4: expected a multiple of the 0 listed"),
        ({"experts": SWIGLU * 3}, "num_experts = 4: expected a multiple of the 3 listed"),
        ({"top_k": 5}, "top_k = 5: expected from 1 to num_experts = 4"),
        ({"capacity_factor": 0.0}, "capacity_factor = 0.0: expected a positive number or null"),
        ({"balance_loss": -1.0}, "balance_loss = -1.0: expected 0 or more"),
        ({"router_z_loss": math.inf}, "router_z_loss = inf: expected 0 or more"),
        ({"experts": [{"kind": "conv-kan"}]}, "looks at more than one token"),
        (
            {"experts": [{"kind": "kann"}]},
            r"experts.0.kind = 'kann' is unknown; expected one of",
        ),
        ({"experts": [{"kind": "kan", "hidden": 3}]}, "the width is that of the block around it"),
    ],
)
def test_impossible_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moe(**options)


def test_experts_are_stated_in_full() -> None:
    (expert,) = complete_feed_forward({"kind": "moe"})["experts"]
    assert expert["kind"] == "kan"
    assert expert["basis"]["degree"] == 3
    assert expert["base"] is None
