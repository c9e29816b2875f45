"""What training lines say: of updates, of phases, and of what modules count."""

import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from kanlm.config import Config, from_tree, merge, to_tree
from kanlm.training import run as runs
from kanlm.training.metrics import PhaseTimer, copied_parameters, update_norms
from kanlm.training.resolve import resolve


def lines(config: Config, kind: str) -> list[dict]:
    text = (Path(config.output_dir) / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


def figures(config: Config) -> list[dict[str, float]]:
    """The training lines' figures of the router, by their short names."""
    return [
        {key.split("/")[1]: value for key, value in line.items() if key.startswith("model.")}
        for line in lines(config, "train")
    ]


def test_training_lines_say_how_tokens_were_routed(routed: Config) -> None:
    runs.run(routed)
    first = lines(routed, "train")[0]
    assert {key.split("/")[0] for key in first if key.startswith("model.")} == {
        "model.layers.1.feed_forward"
    }
    for line, found in zip(lines(routed, "train"), figures(routed), strict=True):
        loads = [found[f"load_{expert}"] for expert in range(4)]
        assert sum(loads) == pytest.approx(1)
        assert found["largest_over_mean_load"] == pytest.approx(4 * max(loads))
        # An expert has room for just its even share of each sequence.
        assert 0 < found["dropped"] < 0.5
        # Near ln 4: the router has hardly begun to choose.
        assert 1.3 < found["router_entropy"] < 1.3863
        assert 0.01 < line["auxiliary_loss"] < 0.02
        # The loss is the language model's alone: no better than the entropy of single bytes.
        assert line["loss"] > 2
    assert "auxiliary_loss" not in lines(routed, "validation")[0]


def test_a_model_without_routers_logs_none(config: Config) -> None:
    runs.run(config)
    assert figures(config) == [{}] * 4
    assert "auxiliary_loss" not in lines(config, "train")[0]


@pytest.mark.parametrize("kind", ["moe", "conv-kan"])
@pytest.mark.parametrize("within", [False, True])
def test_a_shrunk_recipe_trains(config: Config, kind: str, within: bool) -> None:
    """Also of more experts than fit into the shrunk width."""
    spec = {"kind": kind, **({"num_experts": 64, "top_k": 4} if kind == "moe" else {})}
    tree = merge(
        to_tree(config),
        {
            "shrink": True,
            "model": {"feed_forward": spec},
            "data": {"attention_within_documents": within},
        },
    )
    outcome = runs.run(resolve(from_tree(tree)))
    assert outcome is not None
    assert outcome.progress.step == 2


def test_an_update_is_as_long_as_its_parameters_have_moved():
    torch.manual_seed(0)
    first, second = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(5))
    groups = [{"params": [first], "name": "matrices"}, {"params": [second], "name": "vectors"}]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    first.grad, second.grad = torch.randn(3, 2), torch.randn(5)
    before = copied_parameters(optimizer)
    optimizer.step()
    norms = update_norms(optimizer, before)
    expected = {
        "update_norm/matrices": 0.5 * first.grad.norm().item(),
        "update_norm/vectors": 0.5 * second.grad.norm().item(),
    }
    total = 0.5 * torch.cat([first.grad.flatten(), second.grad]).norm().item()
    found = {name: norm.item() for name, norm in norms.items()}
    assert found == pytest.approx({**expected, "update_norm": total})


def test_phases_add_up_and_start_again():
    phases = PhaseTimer(torch.device("cpu"))
    for _ in range(2):
        with phases.of("data"):
            time.sleep(0.01)
    found = phases.read()
    assert list(found) == ["phase_seconds/data"]
    assert 0.02 <= found["phase_seconds/data"] < 0.5
    assert phases.read() == {}
