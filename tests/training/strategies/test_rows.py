"""Which rows a step trains on, by strategies that choose them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kanlm.training import run as runs
from kanlm.training.run import make_batches
from kanlm.training.strategies.base import Strategy
from kanlm.training.strategies.old_text import OldText, stack
from kanlm.training.strategies.rows import ContinueOnBase, Joint, Replay

CONTEXT = 3


class Series:
    """Rows of which each is filled with its number, beginning with `first`."""

    def __init__(self, batch_size: int, first: int) -> None:
        self.batch_size, self.first = batch_size, first

    def batch(self, step: int, rank: int, world_size: int) -> dict[str, torch.Tensor]:
        share = self.batch_size // world_size
        start = self.first + step * self.batch_size + rank * share
        rows = torch.arange(start, start + share).unsqueeze(1).expand(-1, CONTEXT)
        return {"input_ids": rows, "shift_labels": rows}


def prepared(strategy: Any, seed: int = 0, texts: int = 2) -> Strategy:
    strategy.trainer = SimpleNamespace(config=SimpleNamespace(seed=seed))
    old = object.__new__(OldText)
    old.batches = [Series(4, 1000 * (n + 1)) for n in range(texts)]  # type: ignore[list-item]
    old.continued = old.batches[0]
    settings = SimpleNamespace(training=SimpleNamespace(steps=5, batch_size=4))
    old.earlier = [SimpleNamespace(config=settings)] * texts  # type: ignore[list-item]
    strategy.old_text = old
    return strategy


def numbers(strategy: Strategy, steps: int, size: int, ranks: int = 1) -> list[list[int]]:
    """The rows of every step, those of all ranks behind each other."""
    new = Series(size, 0)
    found = []
    for step in range(steps):
        parts = [
            strategy.batch(new.batch(step, rank, ranks), step, rank, ranks) for rank in range(ranks)
        ]
        for part in parts:
            assert torch.equal(part["input_ids"], part["shift_labels"])
            assert torch.equal(part["input_ids"], part["input_ids"][:, :1].expand(-1, CONTEXT))
        found.append([int(n) for part in parts for n in part["input_ids"][:, 0]])
    return found


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.25, 0.7])
def test_replay_gives_its_fraction_of_the_rows_exactly_and_keeps_their_number(fraction: float):
    found = numbers(prepared(Replay(fraction=fraction)), 40, 8)
    assert {len(rows) for rows in found} == {8}
    old = [[n for n in rows if n >= 1000] for rows in found]
    # As near to the fraction as whole rows can be, after every step.
    for steps in range(1, 41):
        count = sum(map(len, old[:steps]))
        assert count <= fraction * 8 * steps + 1e-9 < count + 1
    # The texts take turns, each in its own order, without a gap.
    every = [n for rows in old for n in sorted(rows, key=lambda n: (n % 1000, n))]
    expected = [1000 * (1 + n % 2) + n // 2 for n in range(len(every))]
    assert sorted(every) == sorted(expected)
    # The other places hold what was there.
    for step, rows in enumerate(found):
        assert all(n >= 1000 or n == 8 * step + place for place, n in enumerate(rows))


def test_rows_are_a_function_of_seed_and_step_on_any_number_of_ranks():
    strategies = [
        lambda seed: prepared(Replay(fraction=0.3), seed),
        lambda seed: prepared(ContinueOnBase(), seed),
    ]
    for make in strategies:
        one = numbers(make(0), 10, 8)
        assert one == numbers(make(0), 10, 8, ranks=2) == numbers(make(0), 10, 8, ranks=4)
    places = [
        [[n >= 1000 for n in rows] for rows in numbers(prepared(Replay(fraction=0.3), s), 10, 8)]
        for s in (0, 1)
    ]
    assert places[0] != places[1]
    assert len({tuple(step) for step in places[0]}) > 1


def test_joint_adds_old_rows_to_all_new_ones():
    found = numbers(prepared(Joint(old_rows=2)), 3, 4)
    for step, rows in enumerate(found):
        assert rows[:4] == [4 * step + n for n in range(4)]
        first = 8 * step
        assert rows[4:] == [1000 * (1 + n % 2) + n // 2 for n in range(first, first + 8)]
    two = numbers(prepared(Joint(old_rows=2)), 3, 4, ranks=2)
    assert [sorted(rows) for rows in two] == [sorted(rows) for rows in found]


def test_continuing_follows_the_first_runs_order_whatever_this_runs_seed(tuned):
    config = tuned("continue-on-base", seed=5)
    old = runs._text(config, print).old
    assert old is not None
    first = old.earlier[0]
    assert first.config.seed != config.seed
    theirs = make_batches(first.corpus, first.config)
    size, steps = first.config.training.batch_size, first.config.training.steps
    found = stack([old.first_text_row(n) for n in range(2 * size)])["input_ids"]
    wanted = [theirs.batch(steps + n)["input_ids"] for n in range(2)]
    assert torch.equal(found, torch.cat(wanted))


def test_continuing_begins_where_the_first_run_ended():
    found = numbers(prepared(ContinueOnBase()), 3, 8)
    assert [n for rows in found for n in rows] == list(range(1020, 1044))
