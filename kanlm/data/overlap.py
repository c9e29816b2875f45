"""Which documents stand in another text, however either text was cut into documents.

What a model was trained on is a matter of text, not of names: the same words may come from another
file, from the hub, or cut at other places. So a token counts as found where it lies in a window of
consecutive tokens that also stands in the other text, and a document as found by the share of its
tokens that are. Llama 2 (Touvron et al. 2023, section A.6) calls samples clean of which less than
20% are found by windows of more than 10 tokens. The windows here hold about 64 bytes, whatever the
tokenizer: long enough that phrases are not found, short enough to fit into a paragraph that was a
document by itself.
"""

import math
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from kanlm.data.duplicates import TokenDocuments, scramble

#: Bytes of a window, roughly: its tokens are a power of two.
WINDOW_BYTES = 64
#: A shorter document is looked for by the largest power of two of tokens that fits into it, and by
#: none if that is less than this.
SHORTEST_WINDOW = 8
#: Share of a document's tokens from which on it counts as found.
FOUND_SHARE = 0.2
#: Tokens of the other text that are looked at together.
CHUNK = 2**21

_BITS = 24


class Stream(Protocol):
    """A text as one stream of tokens, in which something ends every document."""

    n_tokens: int

    def tokens(self, start: int, stop: int) -> np.ndarray: ...


def window_tokens(tokens: int, n_bytes: int) -> int:
    """Return the tokens of a window, for text of so many tokens and bytes."""
    wanted = WINDOW_BYTES * tokens / max(n_bytes, 1)
    return 2 ** max(round(math.log2(max(wanted, 1))), _level(SHORTEST_WINDOW))


def found_shares(documents: Iterable[TokenDocuments], text: Stream, window: int) -> np.ndarray:
    """Return the share of each document's tokens that stands in the text, (documents,) float64.

    Args:
        documents: all documents, laid end to end in groups.
        text: what they are looked for in.
        window: tokens of a window, a power of two.
    """
    groups = list(documents)
    if not groups:
        return np.zeros(0)
    tokens = np.concatenate([np.asarray(group.tokens) for group in groups])
    lengths = np.concatenate([group.lengths for group in groups])
    endings = np.concatenate([np.full(len(group.lengths), group.ending) for group in groups])
    starts = np.cumsum(lengths) - lengths
    lengths = lengths - endings
    levels = np.clip(_levels(lengths), 0, _level(window))
    hashes = _hashes(tokens, _level(window))
    covered = np.zeros(len(tokens) + 1, dtype=np.int64)
    for level in range(_level(SHORTEST_WINDOW), _level(window) + 1):
        chosen = np.flatnonzero(levels == level)
        places = _window_starts(starts[chosen], lengths[chosen], 2**level)
        found = places[_found_in(text, level, hashes[level][places])]
        np.add.at(covered, found, 1)
        np.add.at(covered, found + 2**level, -1)
    sums = np.concatenate([[0], np.cumsum(np.cumsum(covered[:-1]) > 0)])
    return (sums[starts + lengths] - sums[starts]) / np.maximum(lengths, 1)


def _level(window: int) -> int:
    return window.bit_length() - 1


def _levels(lengths: np.ndarray) -> np.ndarray:
    """Return log₂ of the largest power of two that is not larger; −1 for 0."""
    return np.frexp(np.maximum(lengths, 0).astype(np.float64))[1] - 1


def _window_starts(starts: np.ndarray, lengths: np.ndarray, window: int) -> np.ndarray:
    """Return where the windows inside documents start, in the stream of all."""
    counts = lengths - window + 1
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(starts, counts) + within


def _found_in(text: Stream, level: int, hashes: np.ndarray) -> np.ndarray:
    """Find which windows, given by their hashes, stand in the text, (windows,) bool."""
    wanted, inverse = np.unique(hashes, return_inverse=True)
    found = np.zeros(len(wanted), dtype=bool)
    if not len(wanted):
        return found[inverse]
    # Most windows of the text are dismissed by a few of their bits.
    possible = np.zeros(2**_BITS, dtype=bool)
    possible[_low(wanted)] = True
    overlap = 2**level - 1
    for start in range(0, max(text.n_tokens - overlap, 0), CHUNK):
        stop = min(start + CHUNK + overlap, text.n_tokens)
        theirs = _hashes(text.tokens(start, stop), level)[level]
        theirs = theirs[possible[_low(theirs)]]
        place = np.minimum(np.searchsorted(wanted, theirs), len(wanted) - 1)
        found[place[wanted[place] == theirs]] = True
    return found[inverse]


def _low(hashes: np.ndarray) -> np.ndarray:
    return (hashes & np.uint64(2**_BITS - 1)).astype(np.int64)


def _hashes(tokens: np.ndarray, last: int) -> list[np.ndarray]:
    """Hash the 2^level tokens from each token on, by level; each doubles the one before."""
    levels = [scramble(tokens.astype(np.uint64) + np.uint64(1))]
    for level in range(last):
        half = 2**level
        hashes = levels[-1]
        first, second = hashes[: max(len(hashes) - half, 0)], hashes[half:]
        levels.append(scramble(first * np.uint64(0x9E3779B97F4A7C15) + second))
    return levels
