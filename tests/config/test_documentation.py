"""What is read off the code of its settings."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Lt

from kanlm.config.documentation import (
    REQUIRED,
    Setting,
    describe_type,
    fields_of,
    options_of,
    summary,
)


@dataclass
class Inner:
    x: int = 1


@dataclass
class Schema:
    """A schema

    of two paragraphs.
    """

    #: How many,
    #: over two lines.
    count: int = 3
    undescribed: float | None = None
    # No description.
    names: list[str] = field(default_factory=lambda: ["a"])
    inner: Inner = field(default_factory=Inner)


class Lower:
    """Lower.

    Args:
        size: of the thing, which is
            described over two lines.
        left, right: either side.

    Raises:
        ValueError: size: is no argument here.
    """

    def __init__(self, size: int, *, left: str = "a", right: Literal["x", "y"] = "x") -> None: ...


class Upper(Lower):
    """Upper.

    Args:
        own: its own.
        left: as of `Lower`; here the upper one.
        right: as of `Lower`.
    """

    def __init__(self, *, own: bool, left: str = "b", right: Literal["x", "y"] = "y") -> None: ...


def test_a_field_has_the_comment_above_it_and_sections_are_left_out():
    assert fields_of(Schema) == [
        Setting("count", "whole number", 3, "How many, over two lines."),
        Setting("undescribed", "number or null", None, ""),
        Setting("names", "list of text", ["a"], ""),
    ]


def test_options_are_keyword_only_and_described_by_the_docstring():
    assert options_of(Lower) == [
        Setting("left", "text", "a", "either side."),
        Setting("right", "`x` or `y`", "x", "either side."),
    ]


def test_a_docstring_may_refer_to_that_of_another_class():
    assert options_of(Upper) == [
        Setting("own", "`true` or `false`", REQUIRED, "its own."),
        Setting("left", "text", "b", "either side. Here the upper one."),
        Setting("right", "`x` or `y`", "y", "either side."),
    ]


def test_a_summary_is_the_first_paragraph():
    assert summary(Schema) == "A schema"


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (tuple[float, float], "[number, number]"),
        (tuple[int, ...], "list of whole number"),
        (dict[str, Any] | list[str], "mapping or list of text"),
        (Annotated[int, Gt(0)] | str, "whole number > 0 or text"),
        (Annotated[float, Ge(0), Lt(1)], "number ≥ 0, < 1"),
        (Literal["off", "on"] | None, "`off` or `on` or null"),
    ],
)
def test_types_are_in_the_words_of_yaml(hint: Any, words: str):
    assert describe_type(hint) == words
