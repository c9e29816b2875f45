"""Samples: greedy where that is asked for, on the device at hand, and leaving no trace."""

import dataclasses
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kanlm.config import GenerationSettings, from_tree
from kanlm.errors import UserError
from kanlm.experiments.generate import generate
from kanlm.training.checkpointing.export import load_tokenizer, load_trained
from kanlm.training.sampling import device_at_hand, sample_text, seeded


def test_temperature_0_takes_the_likeliest_token_each_time(finished_runs: Path):
    run = finished_runs / "kan"
    model, tokenizer = load_trained(run).eval(), load_tokenizer(run)
    settings = GenerationSettings(prompt="the dog ", max_new_tokens=6, temperature=0)
    found = sample_text(model, tokenizer, settings, seed=0)
    ids = [tokenizer.eos_token_id, *tokenizer.encode("the dog ", add_special_tokens=False)]
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert found == tokenizer.decode(ids[1:], skip_special_tokens=True)
    others = [dataclasses.replace(settings, top_k=k) for k in (1, 7)]
    assert [sample_text(model, tokenizer, each, seed=9) for each in others] == [found, found]


def test_a_negative_temperature_is_refused():
    with pytest.raises(UserError, match=r"generation\.temperature = -1: .* or equal to 0"):
        from_tree({"generation": {"temperature": -1}})


def test_generating_leaves_the_random_state_as_it_was(finished_runs: Path):
    model, tokenizer = load_trained(finished_runs / "kan"), load_tokenizer(finished_runs / "kan")
    before = torch.get_rng_state()
    sample_text(model, tokenizer, GenerationSettings(max_new_tokens=4), seed=3)
    assert torch.equal(torch.get_rng_state(), before)


class Devices:
    """Stands for a module such as `torch.cuda`, of several devices, and keeps what is done."""

    def __init__(self) -> None:
        self.current = 0
        self.states = [torch.tensor([device]) for device in range(4)]
        self.touched: set[int] = set()

    def device_count(self) -> int:
        return len(self.states)

    def _index(self, device: Any) -> int:
        index = device if isinstance(device, int) else device.index
        self.touched.add(index)
        return index

    def get_rng_state(self, device: Any) -> torch.Tensor:
        return self.states[self._index(device)]

    def set_rng_state(self, state: torch.Tensor, device: Any) -> None:
        self.states[self._index(device)] = state

    def manual_seed(self, seed: int) -> None:
        self.states[self._index(self.current)] = torch.tensor([seed])

    @contextmanager
    def at(self, index: int):
        before, self.current = self.current, index
        yield
        self.current = before


def test_only_the_models_own_device_is_seeded_and_set_back(monkeypatch):
    devices = Devices()
    monkeypatch.setattr(torch, "get_device_module", lambda device: devices)
    monkeypatch.setattr(torch.accelerator, "device_index", devices.at)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("all are seeded"))
    before = torch.get_rng_state()
    with seeded(torch.device("cuda", 2), 11):
        assert [int(state) for state in devices.states] == [0, 1, 11, 3]
        assert torch.initial_seed() == 11
    assert [int(state) for state in devices.states] == [0, 1, 2, 3]
    assert devices.touched == {2}
    assert torch.equal(torch.get_rng_state(), before)


def test_the_device_at_hand_is_the_accelerator_where_there_is_one(monkeypatch, finished_runs):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert device_at_hand() == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    where = SimpleNamespace(device=None)

    def sample(model: torch.nn.Module, *_: Any) -> str:
        where.device = next(model.parameters()).device
        return ""

    monkeypatch.setattr("kanlm.experiments.generate.sample_text", sample)
    generate(finished_runs / "kan", [])
    assert where.device == torch.device("meta")
