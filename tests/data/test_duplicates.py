"""Near-duplicates against the definition, on Python sets."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kanlm.data import duplicates
from kanlm.data.duplicates import TokenDocuments, distinct_shingles, near_duplicates


def shingle_set(tokens):
    if len(tokens) < 8:
        return {tuple(tokens)}
    return {tuple(tokens[i : i + 8]) for i in range(len(tokens) - 7)}


def jaccard(first, second):
    first, second = shingle_set(first), shingle_set(second)
    return len(first & second) / len(first | second)


def group(documents, ending=1):
    """Lay documents end to end, each with `ending` tokens 99 behind it."""
    laid = [np.array([*document, *[99] * ending], dtype=np.uint16) for document in documents]
    lengths = np.array([len(document) for document in laid], dtype=np.int64)
    tokens = np.concatenate([np.zeros(0, dtype=np.uint16), *laid])
    return TokenDocuments(tokens, lengths, ending)


# Pieces of few stock sequences, so that documents share much.
STOCK = [list(range(20)), [1] * 15, list(range(30, 45)), [3, 4] * 6, [7]]
pieces = st.lists(st.sampled_from(STOCK), max_size=3).map(lambda parts: [*chain(*parts)])
documents = st.builds(lambda tokens, cut: tokens[cut:] or [5], pieces, st.integers(0, 6))
collections = st.lists(documents, min_size=1, max_size=6)


@given(
    st.lists(collections, min_size=1, max_size=2),
    st.lists(collections, min_size=1, max_size=2),
    st.sampled_from([0.2, 0.5, 0.8, 1.0]),
    st.sampled_from([0, 1]),
)
def test_marks_are_those_of_brute_force(training, held_out, threshold, ending):
    found = near_duplicates(
        [group(docs, ending) for docs in training],
        [group(docs, ending) for docs in held_out],
        threshold,
    )
    others = [document for docs in held_out for document in docs]
    for docs, marks in zip(training, found, strict=True):
        expected = [any(jaccard(d, other) >= threshold for other in others) for d in docs]
        assert marks.tolist() == expected


def test_chunks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 50, rng.integers(1, 60)).tolist() for _ in range(60)]
    training = [group([*texts[:30], *[text[:-1] for text in texts[30:45]]])]
    held_out = [group(texts[30:])]
    whole = near_duplicates(training, held_out, 0.5)
    monkeypatch.setattr(duplicates, "TRAINING_CHUNK", 64)
    monkeypatch.setattr(duplicates, "HELD_OUT_CHUNK", 100)
    np.testing.assert_array_equal(near_duplicates(training, held_out, 0.5)[0], whole[0])
    assert whole[0][30:].sum() > 8
    assert not whole[0][:30].any()


def test_shingles_do_not_reach_over_documents():
    halves = [list(range(4)), list(range(4, 8))]
    assert not near_duplicates([group([list(range(8))])], [group(halves)], 0.1)[0].any()


def test_nothing_held_out_marks_nothing():
    assert near_duplicates([group([[1, 2]])], [], 0.5)[0].tolist() == [False]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64])
def test_the_type_of_the_tokens_does_not_matter(dtype):
    tokens = np.arange(20, dtype=dtype)
    documents = TokenDocuments(tokens, np.array([20]), 1)
    np.testing.assert_array_equal(
        distinct_shingles([documents]), distinct_shingles([group([range(19)])])
    )


def test_a_sample_of_shingles_is_a_subset_of_the_stated_size():
    tokens = np.random.default_rng(0).integers(0, 50_000, 40_000)
    everything = distinct_shingles([TokenDocuments(tokens, np.array([40_000]), 0)])
    sample = distinct_shingles([TokenDocuments(tokens, np.array([40_000]), 0)], 0.25)
    assert len(everything) == 39_993
    assert np.isin(sample, everything).all()
    assert abs(len(sample) / len(everything) - 0.25) < 0.02
