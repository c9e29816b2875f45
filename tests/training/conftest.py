"""A run on a tiny model and a text made here."""

from pathlib import Path

import pytest

from kanlm.config import Config, from_tree
from kanlm.training.resolve import resolve


@pytest.fixture
def config(tmp_path: Path, make_tree) -> Config:
    return resolve(from_tree(make_tree(tmp_path)))
