"""Numbers as people read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kanlm.reporting.format import MISSING, count, duration, fixed, signed, significant, span


def test_missing_numbers_are_a_dash() -> None:
    for write in (fixed, signed, significant, count, duration, span):
        assert write(None) == MISSING
    assert span([1.0, None]) == MISSING


def test_fixed_and_signed() -> None:
    assert fixed(2.10449) == "2.104"
    assert fixed(-0.05, 2) == "−0.05"
    assert signed(0.12) == "+0.120"
    assert signed(-0.0341) == "−0.034"
    assert signed(0.0001) == signed(-0.0001) == "0.000"


@pytest.mark.parametrize(
    ("value", "text"),
    [(8.314, "8.31"), (83.14, "83.1"), (831.4, "831"), (8314, "8,310"), (9.999, "10.0"), (0, "0")],
)
def test_significant(value: float, text: str) -> None:
    assert significant(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1152, "1.15 k"),
        (999_949, "1.00 M"),
        (1_049_340, "1.05 M"),
        (2.46e9, "2.46 G"),
        (3e12, "3.00 T"),
        (37_540.2, "37.5 k"),
        (2.5, "2.50"),
    ],
)
def test_count(value: float, text: str) -> None:
    assert count(value) == text


def test_count_with_a_unit() -> None:
    assert count(912_000_000, "B") == "912 MB"
    assert count(12, "B") == "12 B"


@given(st.floats(1, 9e14))
def test_count_reads_back_to_three_digits(value: float) -> None:
    number, _, prefix = count(value).partition(" ")
    scale = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[prefix]
    assert float(number.replace(",", "")) * scale == pytest.approx(value, rel=0.005)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.00123, "1.23 ms"),
        (4.21, "4.21 s"),
        (61.4, "61.4 s"),
        (98.2, "1.64 min"),
        (5000, "83.3 min"),
        (7500, "2.08 h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_span() -> None:
    assert span([2.081, 2.131]) == "2.081–2.131"
    assert span([-0.07, 0.03]) == "−0.070 to 0.030"
