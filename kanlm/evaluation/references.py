"""What a model has to beat: a smoothed bigram and a general-purpose compressor.

Both are given in bits per byte over the same held-out text as the models.
"""

import json
import lzma
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from scipy import optimize

from kanlm.atomic_io import write_text
from kanlm.config import check
from kanlm.data.corpus import Corpus as DataCorpus
from kanlm.data.sources.base import hash_json
from kanlm.data.tokenizer import tokenizer_hash, vocabulary_size
from kanlm.evaluation.perplexity import HeldOut
from kanlm.results.schema import References
from kanlm.untrusted_io import read_object

#: Training tokens that the bigram counts, spread evenly over the split.
BIGRAM_TOKENS = 10_000_000
#: Bytes of either split that xz reads, spread evenly over their documents. At its best it
#: packs about 1 MB a second, and the training text is packed twice.
XZ_TRAINING_BYTES = 3_000_000
XZ_HELDOUT_BYTES = 1_000_000
#: Stretches that a capped training stream is read in.
_STRETCHES = 64


class Readable(HeldOut, Protocol):
    """A split whose documents can also be had as text."""

    def text(self, index: int) -> str: ...


class Corpus(Protocol):
    """What references read of a domain; of the tokenizer, its vocabulary and `eos_token_id`."""

    @property
    def tokenizer(self) -> Any: ...

    def split(self, name: str) -> Readable: ...


def references(corpus: Corpus, split: str) -> References:
    """Compute both references on one held-out split of a domain."""
    bigram, discount, tokens = bigram_bits_per_byte(corpus, split)
    xz, training_bytes, heldout_bytes = xz_bits_per_byte(corpus, split)
    return References(bigram, discount, tokens, xz, training_bytes, heldout_bytes)


def cached_references(corpus: DataCorpus, split: str) -> dict[str, Any]:
    """Compute `references` once, and keep them in the domain's cache folder.

    Raises:
        UserError: what is kept is damaged, or cannot be written.
    """
    limits = [BIGRAM_TOKENS, XZ_TRAINING_BYTES, XZ_HELDOUT_BYTES]
    key = hash_json([corpus.fingerprint, tokenizer_hash(corpus.tokenizer), split, limits])
    path = Path(corpus.data.cache_dir) / f"references-{key[:16]}.json"
    if not path.exists():
        write_text(path, json.dumps(asdict(references(corpus, split)), indent=1))
    found = read_object(path)
    check(References, found, str(path))
    return found


def bigram_bits_per_byte(corpus: Corpus, split: str) -> tuple[float, float, int]:
    """Score a token bigram with interpolated Kneser-Ney smoothing.

    With c the counts of training bigrams, n₊ numbers of distinct ones, D the discount
    and V the size of the vocabulary,

        p(w | v) = max(c(v, w) − D, 0) / c(v) + D · n₊(v, ·) / c(v) · q(w)
        q(w) = max(n₊(·, w) − D, 0) / n₊ + D · |{w : n₊(·, w) > 0}| / n₊ · 1 / V

    and p(w | v) = q(w) after a v never seen (Kneser and Ney 1995; interpolated as in Chen
    and Goodman 1998). D maximises the likelihood of the validation split.

    Returns:
        bits per byte of `split`, the discount, and the training tokens counted, which
        are at most BIGRAM_TOKENS.
    """
    train = corpus.split("train")
    counts = _Counts(_stretches(train), vocabulary_size(corpus.tokenizer))
    end = corpus.tokenizer.eos_token_id
    validation = counts.look_up(_pairs(corpus.split("validation"), end))
    found: Any = optimize.minimize_scalar(
        lambda discount: counts.nats(validation, discount),
        bounds=(1e-3, 1 - 1e-3),
        method="bounded",
        options={"xatol": 1e-3},
    )
    discount = float(found.x)
    held_out = corpus.split(split)
    nats = counts.nats(counts.look_up(_pairs(held_out, end)), discount)
    bits_per_byte = float(nats / held_out.document_bytes.sum() / np.log(2))
    return bits_per_byte, discount, min(train.n_tokens, BIGRAM_TOKENS)


def xz_bits_per_byte(corpus: Corpus, split: str) -> tuple[float, int, int]:
    """Measure what xz adds for held-out text that follows training text, by held-out byte:

        8 · (|xz(train + held-out)| − |xz(train)|) / |held-out|

    with preset 9e and a dictionary that spans all of it. Both parts are cut to the limits
    above, which keeps this under about 10 seconds.

    Returns:
        bits per byte, and the training and held-out bytes that were compressed.
    """
    train = b"".join(_documents(corpus.split("train"), XZ_TRAINING_BYTES))
    held_out = b"".join(_documents(corpus.split(split), XZ_HELDOUT_BYTES))
    added = _xz_size(train + held_out) - _xz_size(train)
    return 8 * added / len(held_out), len(train), len(held_out)


@dataclass(frozen=True, eq=False)
class _Found:
    """Counts that belong to each pair (v, w) of a text; arrays (pairs,), float64."""

    pair: np.ndarray
    history: np.ndarray
    continuations: np.ndarray
    predecessors: np.ndarray


class _Counts:
    """Bigram counts of training text."""

    def __init__(self, stretches: Iterator[np.ndarray], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        codes = [stretch[:-1] * vocab_size + stretch[1:] for stretch in stretches]
        self.codes, self.pairs = np.unique(np.concatenate(codes), return_counts=True)
        first, second = np.divmod(self.codes, vocab_size)
        #: (vocab_size,) each: c(v), n₊(v, ·) and n₊(·, w).
        self.history = np.bincount(first, weights=self.pairs, minlength=vocab_size)
        self.continuations = np.bincount(first, minlength=vocab_size)
        self.predecessors = np.bincount(second, minlength=vocab_size)

    def look_up(self, pairs: np.ndarray) -> _Found:
        codes = pairs[0] * self.vocab_size + pairs[1]
        place = np.minimum(np.searchsorted(self.codes, codes), len(self.codes) - 1)
        return _Found(
            pair=np.where(self.codes[place] == codes, self.pairs[place], 0).astype(float),
            history=self.history[pairs[0]].astype(float),
            continuations=self.continuations[pairs[0]].astype(float),
            predecessors=self.predecessors[pairs[1]].astype(float),
        )

    def nats(self, found: _Found, discount: float) -> float:
        """Compute Σ −ln p(w | v)."""
        kinds = len(self.codes)
        floor = discount * np.count_nonzero(self.predecessors) / kinds / self.vocab_size
        lower = np.maximum(found.predecessors - discount, 0) / kinds + floor
        seen = np.maximum(found.history, 1)
        higher = np.maximum(found.pair - discount, 0) / seen
        left = np.where(found.history > 0, discount * found.continuations / seen, 1)
        return float(-np.log(higher + left * lower).sum())


def _stretches(train: HeldOut) -> Iterator[np.ndarray]:
    """Return the whole training stream, or evenly spread stretches of BIGRAM_TOKENS in sum."""
    if train.n_tokens <= BIGRAM_TOKENS:
        yield train.tokens(0, train.n_tokens)
        return
    length = BIGRAM_TOKENS // _STRETCHES
    for start in np.linspace(0, train.n_tokens - length, _STRETCHES).astype(int).tolist():
        yield train.tokens(start, start + length)


def _pairs(split: HeldOut, end_of_document: int) -> np.ndarray:
    """Stack every token below the one before it, (2, tokens), the first after an ended document."""
    tokens = split.tokens(0, split.n_tokens).astype(np.int64)
    return np.stack([np.concatenate([[end_of_document], tokens[:-1]]), tokens])


def _documents(split: Readable, limit: int) -> Iterator[bytes]:
    """Return all documents, or every k-th, and at most `limit` bytes."""
    step = max(1, -(-int(split.document_bytes.sum()) // limit))
    for index in range(0, len(split.document_bytes), step):
        document = split.text(index).encode()[:limit]
        limit -= len(document)
        yield document


def _xz_size(data: bytes) -> int:
    dictionary = max(len(data), 4096)
    filters = [
        {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}
    ]
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))
