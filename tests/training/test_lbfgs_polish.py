"""The polish against least squares, and what a run says of it."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kanlm.config import Config, from_tree, merge, to_tree
from kanlm.kan import BSpline, KANLinear
from kanlm.kan.penalties import penalty
from kanlm.training import lbfgs_polish
from kanlm.training import run as runs
from kanlm.training.lbfgs_polish import Polish, coefficients, polish
from kanlm.training.resolve import resolve


class Regression(nn.Module):
    """A KAN layer's squared error, in the words of a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = KANLinear(2, 1, basis=BSpline(degree=2, grid_size=4)).double()
        self.dropout = nn.Dropout(0.5)
        self.broken = False

    def forward(self, input_ids: Tensor, shift_labels: Tensor, num_items_in_batch: Tensor):
        y = self.layer(self.dropout(input_ids)).squeeze(-1)
        loss = (y - shift_labels).square().sum() / num_items_in_batch
        return SimpleNamespace(loss=loss * torch.nan if self.broken else loss)


def data(seed: int = 0, rows: int = 60) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, generator=draw, dtype=torch.float64).clamp(-2.9, 2.9)
    return {"input_ids": x, "shift_labels": x[:, 0].sin() * x[:, 1]}


def polished(model: nn.Module, batches: list[dict[str, Tensor]], **options) -> Polish:
    settings = {"micro_batch_size": None, "steps": 200, **options}
    return polish(Accelerator(cpu=True), model, batches, **settings)


def rest(model: Regression) -> list[Tensor]:
    return [p.clone() for n, p in model.named_parameters() if not n.endswith("coefficients")]


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_finds_the_least_squares_fit_and_moves_coefficients_alone(weight: float) -> None:
    """Its objective is quadratic in them: numpy solves it, with l2 as rows of their own."""
    torch.manual_seed(0)
    model, batch = Regression().train(), data()
    before = rest(model)
    with torch.no_grad():
        linear = model.layer(batch["input_ids"]) - model.layer.basis.contract(
            batch["input_ids"], model.layer.coefficients
        )
        columns = model.layer.basis.values(batch["input_ids"]).flatten(1) / 60**0.5
        wanted = (batch["shift_labels"] - linear.squeeze(-1)) / 60**0.5
    rows = np.vstack([columns.numpy(), weight**0.5 * np.eye(columns.shape[1])])
    target = np.concatenate([wanted.numpy(), np.zeros(columns.shape[1])])
    solution, *_ = np.linalg.lstsq(rows, target, rcond=None)
    least = np.square(rows @ solution - target).sum()

    outcome = polished(
        model, [batch], penalties=lambda: [penalty(model, {"l2": weight}) if weight else None]
    )
    assert outcome.loss_after == pytest.approx(least, abs=1e-8)
    assert outcome.loss_after < outcome.loss_before / 2
    assert outcome.tokens == 60
    assert 0 < outcome.iterations <= 200
    assert all(torch.equal(a, b) for a, b in zip(before, rest(model), strict=True))
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_the_batch_may_come_in_pieces() -> None:
    torch.manual_seed(0)
    whole, pieces = Regression(), Regression()
    pieces.load_state_dict(whole.state_dict())
    batch = data()
    halves = [{k: v[s] for k, v in batch.items()} for s in (slice(30), slice(30, None))]
    one = polished(whole, [batch], steps=10)
    other = polished(pieces, halves, steps=10, micro_batch_size=7)
    assert other.loss_after == pytest.approx(one.loss_after, rel=1e-9)
    torch.testing.assert_close(whole.layer.coefficients, pieces.layer.coefficients)


def test_no_more_iterations_than_asked_for() -> None:
    assert polished(Regression(), [data()], steps=3).iterations == 3


def test_coefficients_without_a_gradient_or_frozen_ones_stay() -> None:
    """An expert that no token of the batch chose, and a layer that is not trained."""
    torch.manual_seed(0)
    model = Regression()
    model.add_module("unchosen", KANLinear(2, 2).double())
    model.add_module("frozen", KANLinear(2, 2).double().requires_grad_(False))
    assert len(coefficients(model)) == 2
    kept = [p.clone() for n, p in model.named_parameters() if not n.startswith("layer")]
    outcome = polished(model, [data()], steps=5)
    assert outcome.loss_after < outcome.loss_before
    now = [p for n, p in model.named_parameters() if not n.startswith("layer")]
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))


def test_coefficients_that_it_cannot_better_are_put_back() -> None:
    torch.manual_seed(0)
    model = Regression()
    before = model.layer.coefficients.detach().clone()
    model.broken = True
    outcome = polished(model, [data()], steps=5)
    assert np.isnan(outcome.loss_before)
    assert torch.equal(model.layer.coefficients, before)


# In a run


def lines(config: Config) -> list[dict]:
    text = (Path(config.output_dir) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def polishing(config: Config) -> Config:
    part = {"training": {"polish_steps": 5, "polish_batch_size": 32}}
    return resolve(from_tree(merge(to_tree(config), part)))


def test_a_run_ends_with_it_and_validates_before_and_after(
    polishing: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = runs.run(polishing)
    assert outcome is not None
    found = [line for line in lines(polishing) if line["kind"] != "grid"]
    assert [x["kind"] for x in found[-4:]] == ["validation", "polish", "validation", "sample"]
    before, done, after, _ = found[-4:]
    assert done["loss_after"] < done["loss_before"]
    assert 1 <= done["iterations"] <= 5
    # The whole of each sequence, but for labels that an epoch has had already.
    assert 31 * 16 < done["tokens"] <= 32 * 16
    trained = [x for x in found if x["kind"] == "train"][-1]
    assert outcome.progress.tokens == trained["tokens"] + done["tokens"]
    assert outcome.progress.seconds == pytest.approx(trained["seconds"] + done["seconds"])
    # The text is one that more fitting helps with, and the terminal says no other.
    assert after["nats_per_token"] < before["nats_per_token"]
    assert "polished in 5 iterations" in capsys.readouterr().out

    # Without it the run is the same up to there.
    plain = replace(polishing.training, polish_steps=0, polish_batch_size=None)
    other = replace(polishing, output_dir=str(tmp_path / "plain"), training=plain)
    runs.run(other)
    *_, without = (line for line in lines(other) if line["kind"] == "validation")
    assert without == before


def test_a_finished_run_is_not_polished_again(polishing: Config) -> None:
    runs.run(polishing)
    before = lines(polishing)
    outcome = runs.run(polishing)
    assert lines(polishing) == before
    assert outcome is not None
    nats = outcome.evaluations["words"].nats_per_token
    again = runs.run(polishing)
    assert again is not None
    assert again.evaluations["words"].nats_per_token == nats


def test_a_validation_that_got_worse_is_said(
    polishing: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(accelerator, model, *args, **options) -> Polish:
        with torch.no_grad():
            for parameter in coefficients(model):
                parameter.add_(torch.randn_like(parameter))
        return Polish(2.0, 1.0, 5, 6, 64, 0.1)

    monkeypatch.setattr(lbfgs_polish, "polish", spoil)
    runs.run(polishing)
    assert "validation got worse" in " ".join(capsys.readouterr().out.split())
