"""Documents as tokens: a batch at a time, its documents' sizes and splits beside them."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from kanlm.data.splits import SPLITS, split_of_digest
from kanlm.data.tokenizer import Encoder, batches

#: Documents that are tokenised at once, at most.
BATCH_DOCUMENTS = 4096
#: Batches that are tokenised side by side: one fills the cores that another leaves idle.
THREADS = 2

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Document:
    """A document, or a block of the only one."""

    text: str
    n_bytes: int
    split: str
    #: sha256 of its text; of a block nothing.
    digest: bytes = b""


@dataclass(frozen=True)
class LeftOut:
    """How many documents of a source hold no text."""

    #: Nothing but white space.
    empty: int = 0
    #: No text at all: null, or whatever a format has for it.
    missing: int = 0

    def and_of(self, text: str | None) -> "LeftOut":
        """Count another, None where its text is missing."""
        return LeftOut(self.empty + (text is not None), self.missing + (text is None))

    def counts(self) -> list[str]:
        """Say how many there are, a line for each kind."""
        counts = {"documents of white space": self.empty, "rows without text": self.missing}
        return [f"{count:,} {what} left out" for what, count in counts.items() if count]


def assign_split(text: str, validation_fraction: float, test_fraction: float) -> Document:
    """Find out the split of a document, and its hash."""
    spelt = text.encode()
    digest = hashlib.sha256(spelt).digest()
    split = split_of_digest(digest, validation_fraction, test_fraction)
    return Document(text, len(spelt), split, digest)


def document_batches(items: Iterable[_T], characters: Callable[[_T], int]) -> Iterator[list[_T]]:
    """Group documents into what is tokenised, and may end a shard, at once."""
    return batches(items, characters, BATCH_DOCUMENTS)


def encode_documents(
    encoder: Encoder, ending: list[int], documents: Sequence[Document]
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise documents, each followed by `ending`.

    Returns:
        Tokens end to end, (tokens,) uint32, and tokens, words and bytes of each document,
        (documents, 3) int64.
    """
    texts = [document.text for document in documents]
    tokens, lengths = encoder.encode_end_to_end(texts, ending)
    words = [count_words(text) for text in texts]
    return tokens, np.stack([lengths, words, [doc.n_bytes for doc in documents]], axis=1)


def by_split(
    tokens: np.ndarray, sizes: np.ndarray, splits: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Sort what `encode_documents` returns by split.

    Args:
        tokens: of all documents, end to end.
        sizes: (documents, 3), as `encode_documents` returns them.
        splits: (documents,) places in `SPLITS`.
    """
    of_tokens = np.repeat(splits, sizes[:, 0])
    return {
        name: (tokens[of_tokens == number], sizes[splits == number])
        for number, name in enumerate(SPLITS)
    }


def split_numbers(documents: Sequence[Document]) -> np.ndarray:
    """Return each document's place in `SPLITS`, (documents,) uint8."""
    return np.array([SPLITS.index(document.split) for document in documents], dtype=np.uint8)


def ahead(function: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
    """Map in order, a few items ahead of who asks, on threads."""
    waiting: deque[Future[_R]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def count_words(text: str, step: int = 2**16) -> int:
    """Return `len(text.split())`, without the list, whose strings take ten times the text."""
    count = 0
    for start in range(0, len(text), step):
        count += len(text[start : start + step].split())
        if start and not (text[start - 1].isspace() or text[start].isspace()):
            count -= 1
    return count
