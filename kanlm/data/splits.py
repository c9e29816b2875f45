"""Which of train, validation and test a piece of text belongs to.

A document's split is a function of its own text alone, so that adding files to a corpus
moves none of the documents that were there.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise

SPLITS = ("train", "validation", "test")

#: Characters of the blocks into which a one-document source is cut.
BLOCK_CHARACTERS = 2048


def split_of_digest(digest: bytes, validation_fraction: float, test_fraction: float) -> str:
    """Assign a document to a split by the first 8 bytes of its hash, as a number in [0, 1)."""
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < validation_fraction:
        return "validation"
    return "test" if place < validation_fraction + test_fraction else "train"


def contiguous_lengths(
    length: int, validation_fraction: float, test_fraction: float
) -> dict[str, int]:
    """Return the characters of one text, in its order, that are train, validation and test.

    The cuts fall at whole characters: training ends at ⌊(1 − v − t)·n⌋, which for
    fractions such as 0.1 and 0 gives the customary 90/10.
    """
    train_end = int(round((1 - validation_fraction - test_fraction) * length, 6))
    validation_end = int(round((1 - test_fraction) * length, 6))
    bounds = (0, train_end, validation_end, length)
    return {
        name: stop - start for name, (start, stop) in zip(SPLITS, pairwise(bounds), strict=True)
    }


class Text:
    """A text that comes in chunks, to be taken by numbers of characters."""

    def __init__(self, chunks: Iterable[str]) -> None:
        self._chunks = iter(chunks)
        self._held = ""

    def take(self, characters: int) -> Iterator[str]:
        """Yield the next so many characters, in chunks."""
        while characters:
            chunk = self._held or next(self._chunks)
            piece, self._held = chunk[:characters], chunk[characters:]
            characters -= len(piece)
            yield piece


def blocks(chunks: Iterable[str], size: int = BLOCK_CHARACTERS) -> Iterator[str]:
    """Cut a long text, which comes in chunks, into blocks of at most `size` characters.

    The blocks join to the text. A block ends before the last line break in its second half,
    else before the last space, else anywhere. Only a break or space that a word follows will
    do: byte-level BPE begins a new word there anyway, so that the tokens of the blocks are,
    but for the last case, those of the whole text.
    """
    held = ""
    for chunk in chunks:
        held += chunk
        start = 0
        # Beside the character after a block, it matters what follows that one.
        while len(held) - start >= size + 2:
            stop = _last_cut(held, start + size // 2, start + size)
            yield held[start:stop]
            start = stop
        held = held[start:]
    while held:
        stop = size if len(held) <= size else _last_cut(held, size // 2, size)
        yield held[:stop]
        held = held[stop:]


def _last_cut(text: str, low: int, high: int) -> int:
    """Return the best place to cut in (low, high]."""
    for space in "\n ":
        place = text.rfind(space, low + 1, high + 1)
        while place != -1 and not text[place + 1 : place + 2].strip():
            place = text.rfind(space, low + 1, place)
        if place != -1:
            return place
    return high
