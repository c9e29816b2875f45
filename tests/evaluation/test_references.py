"""The bigram against one made of dictionaries, and xz on text whose worth is known."""

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kanlm.errors import UserError
from kanlm.evaluation import references as module
from kanlm.evaluation.references import bigram_bits_per_byte, references, xz_bits_per_byte

END = 0


class Split:
    """Documents of token lists, each ended; token t stands for the byte 96 + t."""

    def __init__(self, documents: list[list[int]]) -> None:
        self.documents = documents
        self.stream = np.array([t for document in documents for t in [*document, END]])
        self.n_tokens = len(self.stream)
        self.document_bytes = np.array([len(document) for document in documents])
        self.document_tokens = self.document_bytes + 1
        self.document_words = self.document_bytes

    def tokens(self, start: int, stop: int) -> np.ndarray:
        return self.stream[start:stop]

    def text(self, index: int) -> str:
        return "".join(chr(96 + token) for token in self.documents[index])


class Tokenizer:
    eos_token_id = END

    def __init__(self, size: int) -> None:
        self.size = size

    def get_vocab(self) -> dict[str, int]:
        return {str(index): index for index in range(self.size)}


@dataclass
class Corpus:
    tokenizer: Tokenizer
    splits: dict[str, Split]

    def split(self, name: str) -> Split:
        return self.splits[name]


def make_corpus(splits: dict[str, list[list[int]]], vocab_size: int) -> Corpus:
    return Corpus(Tokenizer(vocab_size), {name: Split(part) for name, part in splits.items()})


def markov_documents(
    rng: np.random.Generator, transitions: np.ndarray, count: int, length: int
) -> list[list[int]]:
    """Documents of tokens 1…n that follow a chain."""
    documents = []
    for _ in range(count):
        state, document = int(rng.integers(len(transitions))), []
        for _ in range(length):
            state = int(rng.choice(len(transitions), p=transitions[state]))
            document.append(state + 1)
        documents.append(document)
    return documents


def dictionary_bigram(train: np.ndarray, vocab_size: int, discount: float):
    """p(w | v) written out from the formula, with dictionaries."""
    counts = Counter(zip(train[:-1].tolist(), train[1:].tolist(), strict=True))
    history: dict[int, int] = defaultdict(int)
    after: dict[int, set[int]] = defaultdict(set)
    before: dict[int, set[int]] = defaultdict(set)
    for (v, w), count in counts.items():
        history[v] += count
        after[v].add(w)
        before[w].add(v)

    def lower(w: int) -> float:
        kinds = len(counts)
        return (
            max(len(before[w]) - discount, 0) / kinds
            + discount * sum(1 for b in before.values() if b) / kinds / vocab_size
        )

    def probability(v: int, w: int) -> float:
        if history[v] == 0:
            return lower(w)
        seen = max(counts[v, w] - discount, 0) / history[v]
        return seen + discount * len(after[v]) / history[v] * lower(w)

    return probability


@pytest.fixture
def chain():
    rng = np.random.default_rng(0)
    transitions = rng.dirichlet(np.full(12, 0.2), size=12)
    splits = {
        name: markov_documents(rng, transitions, count, 60)
        for name, count in (("train", 20), ("validation", 5), ("test", 6))
    }
    # Tokens 14 and 15 are never trained on, 15 is never read.
    splits["test"][0][3] = 14
    return make_corpus(splits, vocab_size=16)


def test_bigram_equals_the_formula_written_with_dictionaries(chain) -> None:
    figure, discount, tokens = bigram_bits_per_byte(chain, "test")
    probability = dictionary_bigram(chain.split("train").stream, 16, discount)
    stream = [END, *chain.split("test").stream.tolist()]
    nats = -sum(np.log(probability(v, w)) for v, w in pairwise(stream))
    assert figure == pytest.approx(nats / np.log(2) / (6 * 60), rel=1e-12)
    assert tokens == 20 * 61
    for v in (END, 3, 14, 15):
        assert sum(probability(v, w) for w in range(16)) == pytest.approx(1)


def test_discount_is_the_best_on_validation(chain) -> None:
    _, discount, _ = bigram_bits_per_byte(chain, "test")

    def nats(discount: float) -> float:
        probability = dictionary_bigram(chain.split("train").stream, 16, discount)
        stream = [END, *chain.split("validation").stream.tolist()]
        return -sum(np.log(probability(v, w)) for v, w in pairwise(stream))

    best = min(np.linspace(0.02, 0.98, 25).tolist(), key=nats)
    assert 0.02 < discount < 0.98
    assert nats(discount) <= nats(best) + 1e-3


def test_bigram_approaches_the_entropy_of_a_chain() -> None:
    rng = np.random.default_rng(1)
    transitions = rng.dirichlet(np.full(5, 0.5), size=5)
    splits = {
        name: markov_documents(rng, transitions, 1, length)
        for name, length in (("train", 20000), ("validation", 2000), ("test", 4000))
    }
    states = np.array(splits["test"][0]) - 1
    conditional = -np.log2(transitions[states[:-1], states[1:]]).mean()
    figure, _, _ = bigram_bits_per_byte(make_corpus(splits, vocab_size=6), "test")
    assert figure == pytest.approx(conditional, rel=0.01)


def test_bigram_counts_a_capped_stream_evenly(chain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BIGRAM_TOKENS", 640)
    stretches = list(module._stretches(chain.split("train")))
    assert sum(map(len, stretches)) == 640
    whole = chain.split("train").stream
    np.testing.assert_array_equal(stretches[0], whole[:10])
    np.testing.assert_array_equal(stretches[-1], whole[-10:])
    assert bigram_bits_per_byte(chain, "test")[2] == 640


def test_xz_of_noise_is_all_its_bits_and_of_a_repetition_next_to_none() -> None:
    rng = np.random.default_rng(0)
    letters = [rng.integers(1, 27, 3000).tolist() for _ in range(5)]
    corpus = make_corpus({"train": letters[:4], "noise": letters[4:], "copy": letters[1:3]}, 32)
    noise, training_bytes, heldout_bytes = xz_bits_per_byte(corpus, "noise")
    # 26 equally likely letters hold log2 26 = 4.70 bits.
    assert np.log2(26) < noise < 1.08 * np.log2(26)
    assert (training_bytes, heldout_bytes) == (12000, 3000)
    assert xz_bits_per_byte(corpus, "copy")[0] < 0.1


def test_xz_reads_documents_spread_over_a_long_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "XZ_TRAINING_BYTES", 100)
    documents = [[1 + i] * 15 for i in range(20)]
    corpus = make_corpus({"train": documents, "test": documents[:2]}, 32)
    # 300 bytes against 100: every third document, the last cut short of 105.
    read = b"".join(module._documents(corpus.split("train"), 100)).decode()
    assert sorted(set(read)) == [chr(97 + i) for i in range(0, 20, 3)]
    assert xz_bits_per_byte(corpus, "test")[1:] == (100, 30)


def test_both_are_reported_with_what_they_read(chain) -> None:
    both = references(chain, "test")
    assert both.bigram == bigram_bits_per_byte(chain, "test")[0]
    assert both.xz == xz_bits_per_byte(chain, "test")[0]
    assert both.xz_training_bytes == 20 * 60


@pytest.mark.parametrize(
    ("content", "said"),
    [(b'{"bigram": 1', "cannot be read"), (b'{"bigram": "low"}', ".bigram = "), (b"{}", "missing")],
)
def test_kept_references_that_are_damaged_are_named(content, said, tmp_path, monkeypatch) -> None:
    known = module.References(3.0, 0.8, 100, 2.5, 1000, 100)
    monkeypatch.setattr(module, "references", lambda corpus, split: known)
    monkeypatch.setattr(module, "tokenizer_hash", lambda tokenizer: "hash")
    corpus: Any = SimpleNamespace(
        fingerprint="abc", tokenizer=None, data=SimpleNamespace(cache_dir=str(tmp_path))
    )
    assert module.cached_references(corpus, "test") == asdict(known)
    monkeypatch.setattr(module, "references", None)
    assert module.cached_references(corpus, "test") == asdict(known)
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    with pytest.raises(UserError, match=str(path)) as caught:
        module.cached_references(corpus, "test")
    assert said in str(caught.value)
