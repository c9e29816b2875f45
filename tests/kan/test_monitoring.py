"""Sums that a module keeps while it trains."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kanlm.kan.monitoring import Monitored


class Positive(nn.Module, Monitored):
    """Counts how many of its inputs are above 0."""

    num_sums = 2

    def forward(self, x: Tensor) -> Tensor:
        self.count(torch.stack([(x > 0).sum(), torch.tensor(x.numel())]))
        return x

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        return {"positive": sums[0] / sums[1]}


def test_nothing_is_counted_before_it_is_asked_for_and_nothing_saved() -> None:
    module = Positive()
    module(torch.ones(3))
    assert module.sums is None
    module.start_counting()
    module(torch.tensor([1.0, -1.0, 2.0]))
    module(torch.tensor([-1.0]))
    assert module.sums is not None
    assert module.sums.tolist() == [2, 4]
    assert module.figures(module.sums.tolist()) == {"positive": 0.5}
    assert not module.state_dict()
    assert not list(module.buffers())


def test_starting_again_counts_from_nothing_in_the_same_memory() -> None:
    module = Positive()
    module.start_counting()
    before = module.sums
    module(torch.ones(3))
    module.start_counting()
    assert module.sums is before
    assert module.sums is not None
    assert module.sums.tolist() == [0, 0]


def test_counts_are_exact_where_float32_is_not() -> None:
    module = Positive()
    module.start_counting()
    module.count(torch.tensor([2**24, 2**24]))
    module.count(torch.tensor([1, 1]))
    assert module.sums is not None
    assert module.sums.tolist() == [2**24 + 1] * 2
