"""Which training documents nearly equal a held-out one.

The measure is the Jaccard similarity |A ∩ B| / |A ∪ B| of two documents' sets of shingles
(A. Broder, "On the resemblance and containment of documents", 1997), here every window of
8 tokens; a document shorter than that is one shingle. It is computed exactly, up to
collisions of 64-bit hashes, not estimated from a sample.

Held-out documents are indexed by shingle in chunks of bounded size and training streams
past. Since |A ∪ B| ≥ |A|, a training document of which fewer than threshold · |A| shingles
occur in the chunk cannot reach the threshold, which spares almost all of them the count.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

SHINGLE_TOKENS = 8
#: Tokens of held-out and of training documents that are looked at together.
HELD_OUT_CHUNK = 2**24
TRAINING_CHUNK = 2**21


@dataclass(frozen=True)
class TokenDocuments:
    """Documents laid end to end.

    Attributes:
        tokens: (tokens,) of any integer type.
        lengths: (documents,) tokens of each, its end-of-document token included.
        ending: tokens at the end of each document that are no text: 1, or 0.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    ending: int


def near_duplicates(
    training: Sequence[TokenDocuments], held_out: Sequence[TokenDocuments], threshold: float
) -> list[np.ndarray]:
    """Mark training documents with a Jaccard similarity ≥ threshold to a held-out document.

    Returns:
        For each entry of `training` a (documents,) bool array.
    """
    marks = [np.zeros(len(group.lengths), dtype=bool) for group in training]
    for index in _indexes(held_out):
        for group, mark in zip(training, marks, strict=True):
            for first, stop in _chunks(group.lengths, TRAINING_CHUNK):
                mark[first:stop] |= index.similar(*shingles(group, first, stop), threshold)
    return marks


def distinct_shingles(groups: Iterable[TokenDocuments], rate: float = 1.0) -> np.ndarray:
    """Return the distinct shingles of all documents together, sorted, uint64.

    Args:
        groups: documents.
        rate: fraction of all possible shingles that take part; which ones depends on the
            shingle alone, so that two samples can be compared.
    """
    limit = np.uint64(min(rate, 1.0) * (2**64 - 2**12))
    found = np.zeros(0, dtype=np.uint64)
    for group in groups:
        for first, stop in _chunks(group.lengths, TRAINING_CHUNK):
            hashes, _ = shingles(group, first, stop)
            found = np.union1d(found, hashes[hashes <= limit] if rate < 1 else hashes)
    return found


def shingles(group: TokenDocuments, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct shingles of documents first…stop−1.

    Returns:
        hashes, uint64, sorted within each document; and offsets, (stop − first + 1,) int64,
        so that those of document first + i are hashes[offsets[i]:offsets[i + 1]].
    """
    ends = np.cumsum(group.lengths)
    begin = int(ends[first] - group.lengths[first])
    tokens = np.asarray(group.tokens[begin : int(ends[stop - 1])])
    starts = ends[first:stop] - group.lengths[first:stop] - begin
    lengths = group.lengths[first:stop] - group.ending
    hashes, owners = _windows(tokens, starts, lengths)
    order = np.lexsort((hashes, owners))
    hashes, owners = hashes[order], owners[order]
    new = np.ones(len(hashes), dtype=bool)
    new[1:] = (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1])
    counts = np.bincount(owners[new], minlength=stop - first)
    return hashes[new], np.concatenate([[0], np.cumsum(counts)])


def _windows(
    tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Hash every window of 8 tokens inside a document, and shorter documents whole.

    Returns:
        hashes, uint64, and for each the number of its document.
    """
    mixed = scramble(tokens.astype(np.uint64) + np.uint64(1))
    windows = np.zeros(max(len(tokens) - SHINGLE_TOKENS + 1, 0), dtype=np.uint64)
    for offset in range(SHINGLE_TOKENS):
        windows *= np.uint64(0x9E3779B97F4A7C15)
        windows += mixed[offset : offset + len(windows)]
    counts = np.maximum(lengths - SHINGLE_TOKENS + 1, 0)
    owners = np.repeat(np.arange(len(lengths)), counts)
    within = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    hashes = windows[starts[owners] + within]
    short = np.flatnonzero(lengths < SHINGLE_TOKENS)
    whole = np.zeros(len(short), dtype=np.uint64)
    for offset in range(SHINGLE_TOKENS - 1):
        inside = offset < lengths[short]
        positions = starts[short[inside]] + offset
        whole[inside] = whole[inside] * np.uint64(0x9E3779B97F4A7C15) + mixed[positions]
    whole += lengths[short].astype(np.uint64) << np.uint64(32)
    return scramble(np.concatenate([hashes, whole])), np.concatenate([owners, short])


def scramble(values: np.ndarray) -> np.ndarray:
    """Spread uint64 values over all 64 bits (the finaliser of SplitMix64)."""
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class _Index:
    """Shingle → the held-out documents that contain it."""

    def __init__(self, hashes: np.ndarray, offsets: np.ndarray) -> None:
        self.sizes = np.diff(offsets)
        owners = np.repeat(np.arange(len(self.sizes)), self.sizes)
        order = np.argsort(hashes, kind="stable")
        self.hashes, first = np.unique(hashes[order], return_index=True)
        self.owners = owners[order]
        self.bounds = np.append(first, len(hashes))

    def similar(self, hashes: np.ndarray, offsets: np.ndarray, threshold: float) -> np.ndarray:
        """Mark the documents with a similarity ≥ threshold to one in the index."""
        place = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        known = self.hashes[place] == hashes
        sizes = np.diff(offsets)
        owners = np.repeat(np.arange(len(sizes)), sizes)
        marks = np.bincount(owners[known], minlength=len(sizes)) >= threshold * sizes
        for document in np.flatnonzero(marks):
            own = slice(offsets[document], offsets[document + 1])
            found = place[own][known[own]]
            postings = [self.owners[self.bounds[i] : self.bounds[i + 1]] for i in found]
            common = np.bincount(np.concatenate(postings), minlength=len(self.sizes))
            union = sizes[document] + self.sizes - common
            marks[document] = bool((common >= threshold * union).any())
        return marks


def _indexes(held_out: Sequence[TokenDocuments]) -> Iterator[_Index]:
    """Build an index of each chunk of held-out documents, one at a time."""
    for group in held_out:
        for first, stop in _chunks(group.lengths, HELD_OUT_CHUNK):
            yield _Index(*shingles(group, first, stop))


def _chunks(lengths: np.ndarray, size: int) -> Iterator[tuple[int, int]]:
    """Group consecutive documents into (first, stop) of at most `size` tokens, or of one."""
    ends = np.cumsum(lengths)
    first = 0
    while first < len(lengths):
        before = ends[first] - lengths[first]
        stop = max(int(np.searchsorted(ends, before + size, side="right")), first + 1)
        yield first, stop
        first = stop
