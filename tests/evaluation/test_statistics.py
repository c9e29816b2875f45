"""Intervals against simulated corpora whose true figure is known."""

import numpy as np
import pytest

from kanlm.errors import UserError
from kanlm.evaluation.statistics import (
    bootstrap_interval,
    paired_interval,
    seeds_and_documents_interval,
)


def simulate(rng: np.random.Generator, documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents of skewed length whose loss a byte varies and falls with length.

    The true figure is E[nats] / E[bytes] / ln 2: with bytes = exp(z), z ~ N(6, 1), and
    nats = bytes · (2 − 0.1 z + noise), E[bytes · z] = E[bytes] · (6 + 1), so the ratio is
    2 − 0.7 = 1.3 nats a byte.
    """
    z = rng.normal(6, 1, documents)
    bytes = np.exp(z)
    return bytes * (2 - 0.1 * z + rng.normal(0, 0.3, documents)), bytes


TRUE = 1.3 / np.log(2)


@pytest.mark.parametrize(
    ("documents", "trials", "least"),
    [(150, 250, 0.89), pytest.param(400, 1500, 0.91, marks=pytest.mark.slow)],
)
def test_intervals_hold_the_true_figure_about_as_often_as_they_say(
    documents: int, trials: int, least: float
) -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for trial in range(trials):
        nats, bytes = simulate(rng, documents)
        interval = bootstrap_interval(nats, bytes, resamples=400, seed=trial)
        inside += interval.low <= TRUE <= interval.high
    assert least <= inside / trials <= 0.985


def test_width_follows_the_standard_error_of_a_mean() -> None:
    # Equal lengths make the ratio a mean, whose normal interval is ±1.96 σ/√n.
    rng = np.random.default_rng(0)
    nats = rng.normal(100, 10, 1000)
    interval = bootstrap_interval(nats, np.full(1000, 50), resamples=4000, seed=0)
    expected = 2 * 1.96 * nats.std() / np.sqrt(1000) / 50 / np.log(2)
    assert interval.high - interval.low == pytest.approx(expected, rel=0.06)
    assert interval.value == pytest.approx(nats.mean() / 50 / np.log(2))


def test_pairing_removes_what_documents_share() -> None:
    rng = np.random.default_rng(2)
    nats, bytes = simulate(rng, 200)
    other = nats + 0.02 * np.log(2) * bytes * rng.normal(1, 0.5, 200)
    difference = paired_interval(nats, other, bytes, resamples=500, seed=0)
    single = bootstrap_interval(nats, bytes, resamples=500, seed=0)
    assert difference.low < -0.02 < difference.high < 0
    assert difference.high - difference.low < (single.high - single.low) / 5


def test_same_seed_same_interval_whatever_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    nats, bytes = simulate(np.random.default_rng(3), 50)
    first = bootstrap_interval(nats, bytes, resamples=200, seed=7)
    assert first == bootstrap_interval(nats, bytes, resamples=200, seed=7)
    assert first != bootstrap_interval(nats, bytes, resamples=200, seed=8)
    monkeypatch.setattr("kanlm.evaluation.statistics._BATCH_ELEMENTS", 1)
    single = bootstrap_interval(nats, bytes, resamples=200, seed=7)
    assert single.high - single.low == pytest.approx(first.high - first.low, rel=0.3)


def test_identical_documents_have_an_interval_of_no_width() -> None:
    interval = bootstrap_interval(np.full(9, 7.0), np.full(9, 5), resamples=50, seed=0)
    assert interval.low == interval.high == interval.value


@pytest.mark.parametrize("documents", [0, 1])
def test_too_few_documents_are_refused(documents: int) -> None:
    with pytest.raises(UserError, match=f"holds {documents}"):
        bootstrap_interval(np.ones(documents), np.ones(documents), resamples=10, seed=0)


def study(
    rng: np.random.Generator, *, seeds: int, of_seeds: float, of_documents: float
) -> tuple[np.ndarray, np.ndarray]:
    """Nats (seeds, documents) and bytes of 60 documents; the true figure is 0.02 bits per byte."""
    bytes = np.exp(rng.normal(6, 0.5, 60))
    bits = 0.02 + rng.normal(0, of_seeds, (seeds, 1)) + rng.normal(0, of_documents, 60)
    bits = bits + rng.normal(0, 0.01, (seeds, 60))
    return bits * bytes * np.log(2), bytes


@pytest.mark.parametrize(
    ("seeds", "of_seeds", "of_documents", "least", "most"),
    [
        (6, 0.02, 0.001, 0.80, 0.92),  # Too narrow, as the docstring says.
        (12, 0.02, 0.001, 0.86, 0.96),
        (6, 0.001, 0.05, 0.89, 0.98),
        (6, 0.02, 0.05, 0.86, 0.97),
    ],
)
def test_intervals_over_seeds_and_documents_hold_the_true_figure_as_often_as_is_said(
    seeds: int, of_seeds: float, of_documents: float, least: float, most: float
) -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for trial in range(300):
        nats, bytes = study(rng, seeds=seeds, of_seeds=of_seeds, of_documents=of_documents)
        interval = seeds_and_documents_interval([nats], [bytes], resamples=400, seed=trial)
        inside += interval.low <= 0.02 <= interval.high
    assert least <= inside / 300 <= most


def test_what_documents_do_to_all_seeds_is_not_averaged_away() -> None:
    nats, bytes = study(np.random.default_rng(0), seeds=8, of_seeds=0, of_documents=0.05)
    crossed = seeds_and_documents_interval([nats], [bytes], resamples=2000, seed=0)
    documents = bootstrap_interval(nats.mean(axis=0), bytes, resamples=2000, seed=0)
    assert crossed.value == pytest.approx(documents.value)
    assert crossed.high - crossed.low == pytest.approx(documents.high - documents.low, rel=0.1)


def test_domains_count_alike_whatever_their_size() -> None:
    rng = np.random.default_rng(0)
    small, large = (study(rng, seeds=3, of_seeds=0.01, of_documents=0.01) for _ in range(2))
    nats, bytes = [small[0][:, :7], 10 * large[0]], [small[1][:7], large[1]]
    interval = seeds_and_documents_interval(nats, bytes, resamples=50, seed=0)
    by_domain = [n.sum(axis=1).mean() / b.sum() for n, b in zip(nats, bytes, strict=True)]
    assert interval.value == pytest.approx(np.mean(by_domain) / np.log(2))
    assert interval.low < interval.value < interval.high


@pytest.mark.parametrize(("shape", "expected"), [((1, 9), "there is 1"), ((3, 1), "holds 1")])
def test_too_few_seeds_or_documents_are_refused(shape: tuple[int, int], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        seeds_and_documents_interval([np.ones(shape)], [np.ones(shape[1])], resamples=9, seed=0)


def test_losses_of_other_documents_or_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="same documents"):
        seeds_and_documents_interval([np.ones((2, 3))], [np.ones(4)], resamples=9, seed=0)
    nats, bytes = [np.ones((2, 4)), np.ones((3, 4))], [np.ones(4), np.ones(4)]
    with pytest.raises(ValueError, match=r"seeds by domain \[2, 3\]"):
        seeds_and_documents_interval(nats, bytes, resamples=9, seed=0)
