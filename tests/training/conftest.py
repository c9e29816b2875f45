"""A run on a tiny model and a text made here."""

from pathlib import Path

import pytest

from kanlm.config import Config, from_tree, merge, to_tree
from kanlm.training.resolve import resolve


@pytest.fixture
def config(tmp_path: Path, make_tree) -> Config:
    return resolve(from_tree(make_tree(tmp_path)))


@pytest.fixture
def routed(config: Config) -> Config:
    """A run of a model whose second layer has experts."""
    experts = {"kind": "moe", "experts": ["kan", "swiglu"], "num_experts": 4}
    layers = ["swiglu", {**experts, "capacity_factor": 1.0}]
    return resolve(from_tree(merge(to_tree(config), {"model": {"feed_forward": layers}})))
