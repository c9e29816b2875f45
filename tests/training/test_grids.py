"""Grids that change in training: functions stay, the optimizer goes on, runs resume exactly."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kanlm.config import Config, from_tree, merge, to_tree
from kanlm.errors import UserError
from kanlm.experiments import study
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.accounting import account
from kanlm.model.grids import adapt_model, grid_layers, refine_model
from kanlm.training import run as runs
from kanlm.training.grids import carry_optimizer, changes_at, grid_size_at
from kanlm.training.resolve import resolve
from kanlm.training.trainer import Trainer

SPLINES = {"kind": "kan", "base": "silu", "basis": {"kind": "bspline", "degree": 2}}
#: Each changes grids in its own way in a run of 12 steps with checkpoints at 4 and 8.
SCHEDULES = {
    "refined": {"grid_schedule": {0: 2, 5: 4, 8: 8}},
    "moved": {"grid_adaptation_steps": [4, 6]},
    "both": {"grid_schedule": {0: 3, 6: 6}, "grid_adaptation_steps": [6]},
}


def scheduled(config: Config, **training) -> Config:
    part = {"model": {"feed_forward": SPLINES, "dropout": 0.0}, "training": training}
    return resolve(from_tree(merge(to_tree(config), part)))


def lines(config: Config, kind: str) -> list[dict]:
    text = (Path(config.output_dir) / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


def tiny_model(**basis) -> KanLMForCausalLM:
    torch.manual_seed(0)
    config = KanLMConfig(
        vocab_size=17,
        d_model=16,
        n_layers=2,
        n_heads=2,
        feed_forward={
            **SPLINES,
            "hidden": 8,
            "basis": {"kind": "bspline", "grid_size": 3, **basis},
        },
    )
    return KanLMForCausalLM(config)


def test_the_size_at_a_step_is_that_of_the_last_entry_before_it() -> None:
    schedule = {0: 2, 10: 4, 30: 8}
    assert [grid_size_at(schedule, step) for step in (0, 9, 10, 29, 30, 99)] == [2, 2, 4, 4, 8, 8]
    training = from_tree(
        {
            "schedule": {"warmup_steps": 0},
            "training": {"steps": 40, "grid_schedule": schedule, "grid_adaptation_steps": [10, 20]},
        }
    ).training
    changes = {step: changes_at(training, step) for step in (0, 9, 10, 20, 30)}
    assert changes == {
        0: (None, False),
        9: (None, False),
        10: (4, True),
        20: (None, True),
        30: (8, False),
    }


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_a_refined_model_computes_the_same_and_is_saved_with_its_grid(
    degree: int, tmp_path: Path
) -> None:
    model = tiny_model(degree=degree)
    tokens = torch.randint(17, (3, 12))
    before = model(tokens).logits
    matrices = refine_model(model, 12)
    assert set(matrices) == {f"{name}.coefficients" for name, _ in grid_layers(model)}
    torch.testing.assert_close(model(tokens).logits, before, rtol=0, atol=2e-6)
    model.save_pretrained(tmp_path)
    loaded = KanLMForCausalLM.from_pretrained(tmp_path)
    assert {layer.basis.grid_size for _, layer in grid_layers(loaded)} == {12}
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_an_adapted_model_computes_nearly_the_same_and_covers_its_inputs() -> None:
    model = tiny_model(degree=3, grid_range=(-6.0, 6.0), grid_size=12)
    tokens = torch.randint(17, (8, 12))
    before = model(tokens).logits
    refits = adapt_model(model, {"input_ids": tokens}, uniform_share=1.0)
    assert all(0 < refit.error < 0.05 for refit in refits.values())
    spread = before.std()
    assert (model(tokens).logits - before).square().mean().sqrt() < 0.05 * spread
    for _, layer in grid_layers(model):
        low, high = layer.basis.ends[0]
        assert 3 < high - low < 8


def test_the_optimizer_goes_on_as_on_the_coarse_grid() -> None:
    """Three steps, then one whose gradient is zero: momentum alone moves the function."""
    model = tiny_model(degree=1)

    def build(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)

    optimizer = build(model)
    tokens = torch.randint(17, (4, 12))
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    fine = tiny_model(degree=1)
    fine.load_state_dict(model.state_dict())
    before = dict(fine.named_parameters())
    stand_in = build(fine)
    for ours, theirs in zip(fine.parameters(), model.parameters(), strict=True):
        stand_in.state[ours] = {k: v.clone() for k, v in optimizer.state[theirs].items()}
    matrices = refine_model(fine, 6)
    carried = carry_optimizer(stand_in, before, fine, build, matrices, 1e-8)
    with torch.no_grad():
        still = model(tokens).logits
    for one, its_optimizer in ((model, optimizer), (fine, carried)):
        for parameter in one.parameters():
            parameter.grad = torch.zeros_like(parameter)
        its_optimizer.step()
    with torch.no_grad():
        moved = (model(tokens).logits - still).norm()
        assert (fine(tokens).logits - model(tokens).logits).norm() < 1e-3 * moved


def test_moments_that_cannot_be_mapped_are_refused() -> None:
    model = tiny_model()

    def build(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)

    optimizer = build(model)
    tokens = torch.randint(17, (2, 8))
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match="not AdamW's"):
        carry_optimizer(optimizer, before, model, build, refine_model(model, 6), 1e-8)


@pytest.mark.parametrize("which", SCHEDULES)
def test_a_run_interrupted_around_a_change_resumes_exactly(
    config: Config, tmp_path: Path, which: str, at
) -> None:
    whole = scheduled(config, **SCHEDULES[which])
    runs.run(whole)
    broken = replace(whole, output_dir=str(tmp_path / "broken"))

    def crash(trainer: Trainer) -> None:
        raise ZeroDivisionError

    for stop in (5, 9):
        with pytest.raises(ZeroDivisionError):
            runs.run(broken, callbacks=[at(stop, crash)])
    runs.run(broken)
    one, other = (
        load_file(Path(c.output_dir) / "model" / "model.safetensors") for c in (whole, broken)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    for kind in ("validation", "grid"):
        assert lines(whole, kind) == lines(broken, kind)
    losses = [[(x["step"], x["loss"]) for x in lines(c, "train")] for c in (whole, broken)]
    assert losses[0] == losses[1]
    saved = json.loads((Path(whole.output_dir) / "model" / "config.json").read_text())
    final = whole.model.feed_forward_by_layer[0]["basis"]["grid_size"]
    assert saved["feed_forward"]["basis"]["grid_size"] == final


def test_occupancy_is_logged_for_every_kan_layer(config: Config) -> None:
    run = scheduled(config, grid_adaptation_steps=[4])
    runs.run(run)
    *_, last = (line for line in lines(run, "grid") if any("use" in key for key in line))
    layers = [key.removesuffix("/use") for key in last if key.endswith("/use")]
    assert len(layers) == 2 * run.model.n_layers
    for layer in layers:
        assert 0.9 < last[f"{layer}/in_range"] <= 1
        assert sum(last[f"{layer}/use"]) == pytest.approx(1)


def test_twins_are_matched_at_the_last_grid(config: Config) -> None:
    arms = {
        "coarse-to-fine": {"training": {"grid_schedule": {0: 2, 6: 8}}},
        "fine": {
            "model": {
                "feed_forward": {
                    **SPLINES,
                    "basis": {"kind": "bspline", "grid_size": 8, "degree": 2},
                }
            }
        },
        "gelu": {"model": {"feed_forward": "gelu"}},
    }
    tree = merge(to_tree(config), {"model": {"feed_forward": SPLINES}, "study": {"arms": arms}})
    planned = {arm.name: arm.config for arm in study.plan(from_tree(tree))}
    assert planned["coarse-to-fine"].model == planned["fine"].model
    counts = {n: account(c.model, 257).parameters["feed_forward"] for n, c in planned.items()}
    assert counts["gelu"] == pytest.approx(counts["fine"], rel=0.02)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"grid_schedule": {0: 4, 6: 6}}, "multiple"),
        ({"grid_schedule": {3: 4}}, "step 0"),
        ({"grid_schedule": {0: 4, 12: 8}}, "updates 0 to 11"),
        ({"grid_adaptation_steps": [12]}, "updates 0 to 11"),
        ({"grid_uniform_share": 1.5}, "grid_uniform_share"),
    ],
)
def test_impossible_schedules_are_refused(config: Config, training: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        scheduled(config, **training)


def test_a_schedule_needs_grids(config: Config) -> None:
    tree = merge(
        to_tree(config),
        {"model": {"feed_forward": "gelu"}, "training": {"grid_schedule": {0: 2, 4: 4}}},
    )
    with pytest.raises(UserError, match=r"training\.grid_schedule .* has a grid"):
        resolve(from_tree(tree))


def test_fine_tuning_keeps_the_grids_of_its_base(config: Config) -> None:
    part = {"initialize_from": "somewhere", "training": {"grid_schedule": {0: 2, 4: 4}}}
    with pytest.raises(UserError, match="belongs to pretraining"):
        from_tree(merge(to_tree(config), part))
