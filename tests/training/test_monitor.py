"""Routers in training: what the log says of them."""

import json
from pathlib import Path

import pytest

from kanlm.config import Config, from_tree, merge, to_tree
from kanlm.training import run as runs
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
