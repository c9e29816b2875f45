"""A tiny text, the settings of a tiny run on it, and finished runs that tests only read."""

import os

# Read when torch is first imported, and by child processes: threads that wait for each other
# over tiny matrices take most of the time on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

WORDS = "the cat sat on a mat and the dog ran to her house in rain with no hat".split()  # noqa: SIM905

# As the command line does, too late for a library that tests have imported before it.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Triton asks when it is first imported, which may be by any test, and never again. Interpreted, it
# still leaves torch.compile on a CPU alone.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A busy machine takes long over what is quick.
hypothesis.settings.register_profile("kanlm", deadline=None)
hypothesis.settings.load_profile("kanlm")

MakeTree = Callable[..., dict[str, Any]]

#: In tests/plugins.
pytest_plugins = ("study_folders",)


@pytest.fixture(autouse=True)
def compiled_afresh() -> Iterator[None]:
    """Each test has torch.compile's limit of versions of one `forward` to itself.

    The limit would otherwise be reached by whichever test came ninth to a process.
    """
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(scope="session")
def make_text() -> Callable[..., str]:
    """Makes 60 documents of 40 words in random order, three line ends between them."""

    def make(words: Sequence[str] = WORDS) -> str:
        draw = random.Random(0)
        return "\n\n\n".join(" ".join(draw.choices(words, k=40)) for _ in range(60))

    return make


@pytest.fixture(scope="session")
def make_tree(make_text: Callable[..., str]) -> MakeTree:
    """Makes the settings of a run in a folder on a text that it writes there."""
    from kanlm.config import merge

    def make(folder: Path, **parts: Any) -> dict[str, Any]:
        text = folder / "words.txt"
        if not text.exists():
            text.write_text(make_text())
        tree = {
            "output_dir": str(folder / "run"),
            "data": {
                "domain": "words",
                "cache_dir": str(folder / "cache"),
                "sources": [{"kind": "files", "path": str(text), "separator": "\n\n\n"}],
                "validation_fraction": 0.1,
                "test_fraction": 0.1,
            },
            "tokenizer": "bytes",
            "model": {
                "d_model": 16,
                "n_layers": 2,
                "n_heads": 2,
                "context_length": 16,
                "dropout": 0.1,
                "feed_forward": "kan",
            },
            "training": {
                "steps": 12,
                "batch_size": 4,
                "log_every": 3,
                "evaluate_every": 5,
                "checkpoint_every": 4,
                "compile": "off",
                "kan_backend": "recompute",
            },
            "schedule": {"warmup_steps": 2},
            "evaluation": {"bootstrap_resamples": 50},
            "generation": {"max_new_tokens": 4},
            "tracking": {"wandb": "disabled"},
        }
        return merge(tree, parts)

    return make


@pytest.fixture(scope="session")
def at() -> Callable[..., Any]:
    """Makes a callback that calls a function with the trainer at a moment of some steps."""
    from kanlm.training.callbacks import Callback
    from kanlm.training.trainer import Trainer

    def make(
        steps: int | Container[int], act: Callable[[Trainer], object], moment: str = "before_step"
    ) -> Callback:
        wanted = [steps] if isinstance(steps, int) else steps

        def method(self: Callback, *arguments: Any) -> None:
            if self.trainer.state.step in wanted:
                act(self.trainer)

        return type("At", (Callback,), {moment: method})()

    return make


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory: pytest.TempPathFactory, make_tree: MakeTree) -> Path:
    """A folder with the finished runs `kan` and `gelu`; to be copied before it is changed."""
    from kanlm.config import from_tree
    from kanlm.experiments.single import train
    from kanlm.training.resolve import resolve

    folder = tmp_path_factory.mktemp("finished")
    for kind in ("kan", "gelu"):
        tree = make_tree(
            folder, output_dir=str(folder / kind), model={"feed_forward": kind, "dropout": 0.0}
        )
        train(resolve(from_tree(tree)))
    return folder
