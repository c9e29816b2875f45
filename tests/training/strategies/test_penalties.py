"""Penalties and divergences against sums by hand and torch's own distributions."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from kanlm.checksums import write_checksums
from kanlm.errors import UserError
from kanlm.training import run as runs
from kanlm.training.strategies.anchors import EWC, L2SP
from kanlm.training.strategies.base import checksum
from kanlm.training.strategies.fisher import fisher_diagonal


class Softmax:
    """A trainer of a linear softmax classifier, whose loss is a mean over a sequence."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Linear(3, 4, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.model.weight.copy_(torch.randn(4, 3, generator=generator))

    def compute_gradients(self, batch: Any) -> None:
        logits = self.model(batch["x"])
        nn.functional.cross_entropy(logits, batch["y"]).backward()


def test_fisher_is_the_mean_of_squared_gradients_of_sequences():
    trainer, draw = Softmax(), np.random.default_rng(0)
    rows = [(draw.normal(size=(5, 3)), draw.integers(4, size=5)) for _ in range(7)]
    found = fisher_diagonal(
        trainer,  # type: ignore[arg-type]
        [{"x": torch.from_numpy(x), "y": torch.from_numpy(y)} for x, y in rows],
    )
    weight = trainer.model.weight.detach().numpy()
    expected = np.zeros((4, 3))
    for x, y in rows:
        p = np.exp(x @ weight.T)
        p /= p.sum(axis=1, keepdims=True)
        gradient = (p - np.eye(4)[y]).T @ x / 5
        expected += gradient**2 / 7
    np.testing.assert_allclose(found["weight"].numpy(), expected, rtol=1e-12)
    assert trainer.model.weight.grad is None


def test_penalties_are_the_sums_of_their_formulas():
    model = nn.Linear(2, 2, bias=True, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        model.bias.copy_(torch.tensor([0.5, -0.5]))
    anchors = {"weight": torch.zeros(2, 2).double(), "bias": torch.ones(2).double()}
    l2sp, ewc = L2SP(weight=0.2), EWC(weight=0.2)
    l2sp.anchors = ewc.anchors = anchors
    ewc.fisher = {
        "weight": torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double(),
        "bias": torch.tensor([0.0, 4.0]).double(),
    }
    # 1 + 4 + 9 + 16 and 0.25 + 2.25; 1 · 1 + 2 · 16 and 4 · 2.25.
    assert l2sp.penalty(model).item() == pytest.approx(0.1 * 32.5, rel=1e-12)  # type: ignore
    assert ewc.penalty(model).item() == pytest.approx(0.1 * 42.0, rel=1e-12)  # type: ignore


def test_fisher_is_left_to_the_next_run_and_not_taken_from_another_model(tuned, tmp_path: Path):
    first = tuned({"kind": "ewc", "sequences": 2}, "first")
    runs.run(first)
    place = Path(first.output_dir) / "callbacks"
    (path,) = place.glob("*.safetensors")
    left = load_file(path)
    assert all((tensor >= 0).all() for tensor in left.values())
    assert sum(tensor.sum() for tensor in left.values()) > 0
    seen: list[dict[str, torch.Tensor]] = []

    class Look(EWC):
        name = "ewc"

        def before_step(self) -> None:
            super().before_step()
            if self.trainer.state.step == 0:
                seen.append({name: f.clone() for name, f in self.fisher.items()})

        def prepare(self) -> None:
            raise AssertionError("it is measured again")

    from kanlm.training.strategies import STRATEGIES

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STRATEGIES, "ewc", Look)
        strategy = {"kind": "ewc", "sequences": 2}
        runs.run(tuned(strategy, "second", initialize_from=first.output_dir))
    assert {f"ewc:{name}" for name in seen[0]} == left.keys()
    assert all(torch.equal(tensor, left[f"ewc:{name}"]) for name, tensor in seen[0].items())

    # Of another model of the same shapes.
    path = Path(first.output_dir) / "model" / "model.safetensors"
    moved = load_file(path)
    moved["model.embed_tokens.weight"] += 1
    save_file(moved, path, metadata={"format": "pt"})
    write_checksums(path.parent)
    with pytest.raises(UserError, match="Fisher information of another model"):
        runs.run(tuned("ewc", "third", initialize_from=first.output_dir))
    assert not (tmp_path / "third" / "config.yaml").exists()


def test_distillation_is_the_divergence_from_the_base_by_torchs_distributions(tuned, bases: Path):
    no_dropout = {"model": {"dropout": 0.0}, "training": {"log_every": 1, "micro_batch_size": 2}}
    config = tuned({"kind": "distillation", "weight": 2.0}, **no_dropout)
    batches: dict[int, Any] = {}
    students: dict[int, Any] = {}

    from kanlm.training.callbacks import Callback

    class Keep(Callback):
        def before_step(self) -> None:
            step = self.trainer.state.step
            batches[step] = self.trainer.batch(step, 0, 1)
            students[step] = {n: t.clone() for n, t in self.trainer.model.state_dict().items()}

    runs.run(config, callbacks=[Keep()])
    text = (Path(config.output_dir) / "metrics.jsonl").read_text()
    lines = [each for each in map(json.loads, text.splitlines()) if each["kind"] == "train"]
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(bases / "kan-local" / "model").eval() for _ in range(2)
    )
    for step, line in enumerate(lines):
        student.load_state_dict(students[step])
        wanted = batches[step]["shift_labels"] != -100
        with torch.no_grad():
            p, q = (
                torch.distributions.Categorical(
                    logits=model(input_ids=batches[step]["input_ids"]).logits[wanted].double()
                )
                for model in (teacher, student)
            )
        expected = torch.distributions.kl_divergence(p, q).mean().item()
        assert line["loss/distillation"] == pytest.approx(2 * expected, rel=1e-4, abs=1e-7)
    assert lines[0]["loss/distillation"] == pytest.approx(0, abs=1e-7)
    assert lines[-1]["loss/distillation"] > 1e-4


def test_checksums_tell_models_apart():
    def model() -> SimpleNamespace | nn.Module:
        torch.manual_seed(0)
        return nn.Linear(3, 2)

    one, other = model(), model()
    assert checksum(one) == checksum(other)  # type: ignore[arg-type]
    with torch.no_grad():
        other.weight[0, 0] += 1e-6  # type: ignore[union-attr]
    assert checksum(one) != checksum(other)  # type: ignore[arg-type]


def test_a_teacher_changes_no_random_number(tuned):
    parts = {"model": {"dropout": 0.2}, "training": {"steps": 2, "evaluate_every": None}}
    found = []
    for kind in ("plain", {"kind": "distillation", "weight": 0.0}):
        config = tuned(kind, f"tuned-{len(found)}", **parts)
        runs.run(config)
        found.append(load_file(Path(config.output_dir) / "model" / "model.safetensors"))
    torch.testing.assert_close(found[1], found[0])
