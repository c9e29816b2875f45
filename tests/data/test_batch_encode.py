"""Batches of documents as tokens: counted in parts, and tokenised ahead in order."""

import time
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kanlm.data.batch_encode import ahead, count_words


@given(st.text("ab \n\x1c\u2003é"), st.integers(1, 5))
def test_words_are_counted_in_parts(text, step):
    assert count_words(text, step) == len(text.split())


def test_what_is_tokenised_ahead_comes_in_order_and_fails_where_it_fails():
    def work(number):
        time.sleep(0.002 * (number % 3))
        return 1 // (number - 20)

    found = ahead(work, iter(range(40)))
    assert list(islice(found, 20)) == [1 // (number - 20) for number in range(20)]
    with pytest.raises(ZeroDivisionError):
        next(found)
