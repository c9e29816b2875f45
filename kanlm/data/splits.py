"""Which of train, validation and test a piece of text belongs to.

A document's split is a function of its own text alone, so that adding files to a corpus
moves none of the documents that were there.
"""

import hashlib
from collections.abc import Iterator

SPLITS = ("train", "validation", "test")

#: Characters of the blocks into which a one-document source is cut.
BLOCK_CHARACTERS = 2048


def text_digest(text: str) -> bytes:
    """Return the sha256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).digest()


def split_of_digest(digest: bytes, validation_fraction: float, test_fraction: float) -> str:
    """Place a document by the number in [0, 1) that the first 8 bytes of its hash make."""
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < validation_fraction:
        return "validation"
    return "test" if place < validation_fraction + test_fraction else "train"


def split_contiguously(
    text: str, validation_fraction: float, test_fraction: float
) -> dict[str, str]:
    """Cut one text, in its order, into train, validation and test.

    The cuts fall at whole characters: training ends at ⌊(1 − v − t)·n⌋, which for
    fractions such as 0.1 and 0 gives the customary 90/10.
    """
    train_end = round((1 - validation_fraction - test_fraction) * len(text), 6)
    validation_end = round((1 - test_fraction) * len(text), 6)
    first, second = int(train_end), int(validation_end)
    return {"train": text[:first], "validation": text[first:second], "test": text[second:]}


def blocks(text: str, size: int = BLOCK_CHARACTERS) -> Iterator[str]:
    """Cut a long text into blocks of at most `size` characters, which join to the text.

    A block ends before the last line break in its second half, else before the last space,
    else anywhere. Only a break or space that a word follows will do: byte-level BPE begins
    a new word there anyway, so that the tokens of the blocks are, but for the last case,
    those of the whole text.
    """
    start = 0
    while start < len(text):
        stop = start + size
        if stop < len(text):
            stop = _last_cut(text, start + size // 2, stop)
        yield text[start:stop]
        start = stop


def _last_cut(text: str, low: int, high: int) -> int:
    """Return the best place to cut in (low, high]."""
    for space in "\n ":
        place = text.rfind(space, low + 1, high + 1)
        while place != -1 and not text[place + 1 : place + 2].strip():
            place = text.rfind(space, low + 1, place)
        if place != -1:
            return place
    return high
