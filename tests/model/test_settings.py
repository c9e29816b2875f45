"""The list of layers and its short form."""

import re

import pytest

from kanlm.model.settings import ModelSettings

GELU, KAN = {"kind": "gelu"}, {"kind": "kan", "basis": {"kind": "hermite"}}


def test_repeat_stands_for_equal_entries() -> None:
    short = ModelSettings(
        n_layers=6, feed_forward=[{**GELU, "repeat": 3}, KAN, {**GELU, "repeat": 1}, KAN]
    )
    long = ModelSettings(n_layers=6, feed_forward=[GELU, GELU, GELU, KAN, GELU, KAN])
    assert short == long
    assert short.feed_forward_by_layer == [GELU, GELU, GELU, KAN, GELU, KAN]
    assert short.feed_forward_by_layer[0] is not short.feed_forward_by_layer[1]


def test_one_kind_is_that_of_every_layer() -> None:
    assert ModelSettings(n_layers=3, feed_forward=GELU).feed_forward_by_layer == [GELU] * 3


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([{**GELU, "repeat": 8}, {**KAN, "repeat": 3}], "lists 11 layers, and n_layers = 12"),
        ([GELU, {**KAN, "repeat": 0}], "feed_forward.1.repeat = 0: expected a whole number"),
        ([{**GELU, "repeat": -1}], "feed_forward.0.repeat = -1"),
        ([{**GELU, "repeat": 2.0}], "feed_forward.0.repeat = 2.0"),
        ([{**GELU, "repeat": True}], "feed_forward.0.repeat = True"),
        ([], "feed_forward lists 0 layers, and n_layers = 12"),
    ],
)
def test_a_list_that_does_not_add_up_is_refused(layers: list, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelSettings(n_layers=12, feed_forward=layers)
