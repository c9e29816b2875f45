"""Settings that no machine holds are refused from arithmetic, before anything is made."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from kanlm.config import from_tree, merge, to_tree
from kanlm.errors import UserError
from kanlm.experiments.planning.run import Devices, _smaller_divisors, plan
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.training import run as runs
from kanlm.training.resolve import count_parameters, resolve


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"model": {"n_layers": 10**9}}, "n_layers = 1000000000: expected at most 100,000"),
        ({"model": {"d_model": 10**30}}, "expected at most 2,147,483,647"),
        ({"model": {"context_length": 10**12}}, "expected at most 2,147,483,647"),
        ({"model": {"vocab_size": 10**12}}, "at most 2,147,483,647"),
        (
            {"model": {"feed_forward": [{"kind": "kan", "repeat": 10**9}]}},
            "lists 1000000000 layers, and n_layers = 2",
        ),
        (
            {"model": {"n_layers": 10**9, "feed_forward": [{"kind": "kan", "repeat": 10**9}]}},
            "n_layers = 1000000000: expected at most 100,000",
        ),
        ({"model": {"feed_forward": {"kind": "moe", "num_experts": 10**6}}}, "at most 10,000"),
        ({"model": {"feed_forward": {"basis": {"degree": 10**6}}}}, "at most 10,000"),
        (
            {"model": {"feed_forward": {"kind": "kan-local", "basis": {"grid_size": 10**9}}}},
            "basis.grid_size = 1000000000: expected at most 10,000",
        ),
        (
            {
                "study": {
                    "arms": {"a": {}},
                    "grid": {
                        f"optimizer.{name}": [1e-3 * k for k in range(1, 101)]
                        for name in ("learning_rate", "weight_decay", "epsilon")
                    },
                }
            },
            "grid has 1,000,000 trials",
        ),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_sizes_that_no_model_has(tmp_path: Path, make_tree: Any, part: dict, message: str):
    started = time.process_time()
    with pytest.raises(UserError) as caught:
        resolve(from_tree(make_tree(tmp_path, **part)))
    assert message in str(caught.value)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"model": {"d_model": 10**7}}, "parameters take .* GB, and this machine has"),
        ({"model": {"n_layers": 10**5, "d_model": 8192}}, "parameters take .* GB"),
        ({"model": {"vocab_size": 2**31 - 1, "d_model": 8192}}, "parameters take .* GB"),
        ({"training": {"batch_size": 10**12}}, "the tokens of one step take .* GB"),
    ],
    ids=json.dumps,
)
def test_what_this_machine_cannot_hold(tmp_path: Path, make_tree: Any, part: dict, message: str):
    config = resolve(from_tree(make_tree(tmp_path, **part)))
    started = time.process_time()
    with pytest.raises(UserError, match=message):
        runs.run(config)
    assert time.process_time() - started < 5
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"model": {"d_model": 10**7}}, "does not fit: .* parameters are .* TB of weights"),
        ({"training": {"batch_size": 10**9}}, "does not fit: the inputs of one layer are"),
    ],
    ids=json.dumps,
)
def test_what_gpus_cannot_hold(tmp_path: Path, make_tree: Any, part: dict, message: str):
    config = resolve(from_tree(make_tree(tmp_path, **part)))
    started = time.process_time()
    with pytest.raises(UserError, match=message):
        plan(config, Devices("h100", 1))
    assert time.process_time() - started < 5


LAYERS = [
    {"kind": "swiglu", "repeat": 3},
    {"kind": "kan-local", "repeat": 2},
    {"kind": "moe", "experts": ["kan", "swiglu"], "num_experts": 4},
]


@pytest.mark.parametrize(
    "part", [{}, {"n_layers": 6, "feed_forward": LAYERS}, {"tie_embeddings": False}], ids=json.dumps
)
def test_parameters_are_counted_from_one_layer_of_each_kind(
    tmp_path: Path, make_tree: Any, part: dict
):
    model = resolve(from_tree(merge(make_tree(tmp_path), {"model": part}))).model
    whole = KanLMForCausalLM(KanLMConfig.from_settings(model, 300))
    assert count_parameters(model, 300) == sum(p.numel() for p in whole.parameters())


def test_resolving_takes_as_long_for_many_layers_as_for_few(tmp_path: Path, make_tree: Any):
    many = make_tree(tmp_path, model={"n_layers": 20_000})
    started = time.process_time()
    config = resolve(from_tree(many))
    assert time.process_time() - started < 5
    few = resolve(from_tree(make_tree(tmp_path)))
    assert config.model.feed_forward == few.model.feed_forward
    listed = {"n_layers": 2000, "feed_forward": [{"kind": "kan", "repeat": 2000}]}
    started = time.process_time()
    config = resolve(from_tree(merge(to_tree(few), {"model": listed})))
    assert time.process_time() - started < 5
    assert config.model.feed_forward == [few.model.feed_forward] * 2000


@pytest.mark.parametrize("rows", [1, 7, 36, 97])
def test_divisors(rows: int):
    for below in (1, 6, rows + 1):
        assert _smaller_divisors(rows, below) == [
            size for size in range(1, below) if rows % size == 0
        ]
