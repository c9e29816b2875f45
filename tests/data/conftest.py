"""Small corpora on the disk."""

import json

import numpy as np
import pytest

from kanlm.config import DataSettings, TokenizerSettings
from kanlm.data.tokenizer import build_tokenizer

WORDS = ["the", "cat", "dog", "né", "sat", "on", "mat", "and", "then", "ran", "to", "see", "it"]


@pytest.fixture(scope="session")
def stories():
    """Makes different documents of 5 to 40 words."""

    def make(count, seed=0):
        rng = np.random.default_rng(seed)
        lines = (" ".join(rng.choice(WORDS, rng.integers(5, 40))) for _ in range(count))
        return [f"{number} {line}\n" for number, line in enumerate(lines)]

    return make


@pytest.fixture(scope="session")
def write_jsonl():
    """Writes documents, one a line."""

    def write(path, texts):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    return write


@pytest.fixture
def make_data(tmp_path, write_jsonl):
    """Makes the settings of a domain of JSONL files with the given documents."""

    def make(*sources, weights=None, **settings):
        specs = []
        for number, texts in enumerate(sources):
            write_jsonl(tmp_path / f"part{number}.jsonl", texts)
            spec = {"kind": "files", "path": f"part{number}.jsonl"}
            specs.append(spec if weights is None else {**spec, "weight": weights[number]})
        return DataSettings(
            sources=specs, root=str(tmp_path), cache_dir=str(tmp_path / "cache"), **settings
        )

    return make


@pytest.fixture(scope="session")
def byte_tokenizer():
    return build_tokenizer(TokenizerSettings(kind="bytes"), lambda: iter(()))


@pytest.fixture(scope="session")
def bpe_tokenizer(stories):
    settings = TokenizerSettings(kind="bpe", vocab_size=280)
    return build_tokenizer(settings, lambda: iter(stories(50)))
