"""Text found in other text, against a search by strings."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kanlm.data import overlap
from kanlm.data.duplicates import TokenDocuments
from kanlm.data.overlap import found_shares, window_tokens


class Text:
    """A stream of tokens."""

    def __init__(self, tokens: bytes) -> None:
        self._tokens = np.frombuffer(tokens, np.uint8).astype(np.int64)
        self.n_tokens = len(tokens)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        return self._tokens[start:stop]


def laid_out(documents: list[bytes]) -> TokenDocuments:
    """End to end, a zero after each."""
    joined = b"".join(document + b"\0" for document in documents)
    lengths = np.array([len(document) + 1 for document in documents])
    return TokenDocuments(np.frombuffer(joined, np.uint8), lengths, ending=1)


def share(document: bytes, text: bytes, longest: int) -> float:
    """By strings: tokens in windows that stand in the text."""
    window = longest
    while window > len(document):
        window //= 2
    if window < overlap.SHORTEST_WINDOW:
        return 0.0
    covered = [False] * len(document)
    for start in range(len(document) - window + 1):
        if document[start : start + window] in text:
            covered[start : start + window] = [True] * window
    return sum(covered) / len(document)


letters = st.lists(st.sampled_from(b"ab"), max_size=60).map(bytes)


@given(st.lists(letters, min_size=1, max_size=6), letters, st.sampled_from([8, 16, 32]))
def test_shares_are_those_of_a_search_by_strings(documents, text, window):
    found = found_shares([laid_out(documents)], Text(text), window)
    assert found.tolist() == pytest.approx([share(d, text, window) for d in documents])


@given(st.data())
def test_the_other_text_may_be_read_in_pieces(data):
    text = data.draw(letters)
    documents = [text[i : i + 20] for i in range(0, max(len(text), 1), 7)]
    size = data.draw(st.integers(1, 40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "CHUNK", size)
        found = found_shares([laid_out(documents)], Text(text), 16)
    assert found.tolist() == [float(len(d) >= overlap.SHORTEST_WINDOW) for d in documents]


def test_groups_of_documents_are_one_text():
    groups = [laid_out([b"0123456789", b"x"]), laid_out([b"abcdefgh"])]
    assert found_shares(groups, Text(b"..abcdefgh.."), 8).tolist() == [0, 0, 1]
    assert found_shares([], Text(b""), 8).tolist() == []


def test_windows_hold_about_as_many_bytes_whatever_the_tokenizer():
    assert window_tokens(1000, 1000) == 64
    assert window_tokens(1000, 4200) == 16
    assert window_tokens(1000, 100_000) == overlap.SHORTEST_WINDOW
