"""A base run on one text, and runs that are fine-tuned from it on another."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kanlm.config import Config, from_tree, merge
from kanlm.training import run as runs
from kanlm.training.inheritance import inherit
from kanlm.training.resolve import resolve

NEW_WORDS = ["def", "return", "x", "y", "import", "print", "lambda", "none", "while", "yield"]

Tuned = Callable[..., Config]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory, make_tree, make_text) -> Path:
    """A folder with the finished runs `kan-local` and `gelu`, and the text `new.txt`."""
    folder = tmp_path_factory.mktemp("bases")
    (folder / "new.txt").write_text(make_text(NEW_WORDS))
    for kind in ("kan-local", "gelu"):
        feed_forward = {"kind": kind, "hidden": 16}
        tree = make_tree(
            folder,
            output_dir=str(folder / kind),
            model={"feed_forward": feed_forward, "n_layers": 1},
            training={"steps": 6, "evaluate_every": None},
        )
        runs.run(resolve(from_tree(tree)))
    return folder


@pytest.fixture(scope="session")
def make_tuned(bases: Path, make_tree) -> Tuned:
    """Makes the configuration of a run in a folder, from a base, by a strategy."""

    def make(folder: Path, strategy: Any, base: str = "kan-local", **parts: Any) -> Config:
        tree = make_tree(bases)
        del tree["model"], tree["tokenizer"]
        source = {"kind": "files", "path": str(bases / "new.txt"), "separator": "\n\n\n"}
        own = {
            "output_dir": str(folder),
            "initialize_from": str(bases / base),
            "strategy": strategy,
            "data": {"domain": "new", "sources": [source]},
            "training": {"steps": 6, "evaluate_every": 4, "checkpoint_every": None},
            "optimizer": {"learning_rate": 1e-2},
        }
        return resolve(inherit(merge(merge(tree, own), parts)))

    return make


@pytest.fixture
def tuned(make_tuned: Tuned, tmp_path: Path) -> Tuned:
    """Makes such a configuration in a folder of the test's, by name."""

    def make(strategy: Any, name: str = "tuned", base: str = "kan-local", **parts: Any) -> Config:
        return make_tuned(tmp_path / name, strategy, base, **parts)

    return make
