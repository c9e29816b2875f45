"""Turns are taken, and ratios are those of one round."""

from benchmarking.measure import interleaved, ratio


def test_functions_take_turns() -> None:
    calls: list[str] = []
    seconds = interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, lambda: None
    )
    assert calls == ["a", "a", "b", "b", *"ababab"]
    assert [len(times) for times in seconds.values()] == [3, 3]


def test_a_ratio_pairs_what_ran_side_by_side() -> None:
    """A machine that is three times slower in one round changes no ratio."""
    assert ratio([2.0, 6.0, 2.0], [1.0, 3.0, 1.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert ratio([3.0], [2.0])["median"] == 1.5
