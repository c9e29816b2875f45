"""Splits: independence of the rest of the corpus, stated fractions, nothing lost."""

import hashlib

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from kanlm.data.splits import Text, blocks, contiguous_lengths, split_of_digest


def sha256(text):
    return hashlib.sha256(text.encode()).digest()


def test_documents_fall_into_splits_by_the_stated_fractions():
    n = 20_000
    names = [split_of_digest(sha256(f"document {i}"), 0.1, 0.05) for i in range(n)]
    for name, share in (("train", 0.85), ("validation", 0.1), ("test", 0.05)):
        sigma = np.sqrt(share * (1 - share) / n)
        assert abs(names.count(name) / n - share) < 5 * sigma


@given(st.text(), st.floats(0.01, 0.4), st.floats(0, 0.4))
def test_raising_a_fraction_moves_no_document_out_of_validation(text, validation, test):
    digest = sha256(text)
    if split_of_digest(digest, validation, test) == "validation":
        assert split_of_digest(digest, validation + 0.1, test) == "validation"


@given(st.integers(0, 10**9), st.floats(0.01, 0.5), st.floats(0, 0.4))
def test_contiguous_splits_join_to_the_text(length, validation, test):
    lengths = contiguous_lengths(length, validation, test)
    assert sum(lengths.values()) == length
    assert abs(lengths["train"] - (1 - validation - test) * length) <= 1.001
    assert abs(lengths["test"] - test * length) <= 1.001


def test_shakespeare_is_cut_where_nanogpt_cuts_it():
    # karpathy/nanoGPT data/shakespeare_char/prepare.py: train_data = data[:int(n * 0.9)],
    # 1,003,854 and 111,540 of 1,115,394 characters.
    lengths = contiguous_lengths(1_115_394, 0.1, 0.0)
    assert lengths == {"train": 1_003_854, "validation": 111_540, "test": 0}


@given(st.lists(st.text("ab", min_size=1, max_size=9), max_size=5), st.data())
def test_a_text_is_taken_by_characters(chunks, data):
    whole, text = "".join(chunks), Text(chunks)
    taken = []
    while sum(map(len, taken)) < len(whole):
        count = data.draw(st.integers(1, len(whole) - sum(map(len, taken))))
        taken.append("".join(text.take(count)))
        assert len(taken[-1]) == count
    assert "".join(taken) == whole


@given(st.lists(st.text("ab é\n\t", max_size=100), max_size=6), st.integers(2, 40))
def test_blocks_join_to_the_text_and_keep_to_their_size(chunks, size):
    parts = list(blocks(chunks, size))
    assert "".join(parts) == "".join(chunks)
    assert all(0 < len(part) <= size for part in parts)
    assert all(len(part) > size // 2 for part in parts[:-1])


@given(st.lists(st.text("ab \n", max_size=30), max_size=9), st.integers(2, 20))
def test_blocks_do_not_depend_on_the_chunks(chunks, size):
    assert list(blocks(chunks, size)) == list(blocks(["".join(chunks)], size))


@example(["word word\n", "word word\n", "word word\n", "é, x\n ", "- 1\n\n"])
@given(st.lists(st.sampled_from(["word word\n", "it's 99  ", "\n\na b c", "é, x\n ", "- 1\n\n"])))
def test_blocks_end_where_a_word_of_byte_level_bpe_ends(pieces):
    text = "".join(pieces)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def words(part):
        return [word for word, _ in level.pre_tokenize_str(part)]

    joined = [word for part in blocks([text], 40) for word in words(part)]
    assert joined == words(text)


@pytest.mark.parametrize("text", ["", "x" * 100])
def test_text_without_a_good_place_is_cut_anywhere(text):
    assert list(blocks([text], 30)) == [text[i : i + 30] for i in range(0, len(text), 30)]
