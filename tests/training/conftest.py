"""A run on a tiny model and a text made here."""

from pathlib import Path

import pytest
import torch

from kanlm.config import Config, from_tree
from kanlm.training.resolve import resolve

WORDS = "the cat sat on a mat and the dog ran to her house in rain with no hat".split()  # noqa: SIM905


@pytest.fixture
def config(tmp_path: Path) -> Config:
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(WORDS), (60, 40), generator=generator)
    text = "\n\n\n".join(" ".join(WORDS[i] for i in row) for row in picks.tolist())
    (tmp_path / "words.txt").write_text(text)
    tree = {
        "output_dir": str(tmp_path / "run"),
        "data": {
            "domain": "words",
            "cache_dir": str(tmp_path / "cache"),
            "sources": [
                {"kind": "files", "path": str(tmp_path / "words.txt"), "separator": "\n\n\n"}
            ],
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
        },
        "schedule": {"warmup_steps": 2},
        "generation": {"max_new_tokens": 4},
        "tracking": {"wandb": "disabled"},
    }
    return resolve(from_tree(tree))
