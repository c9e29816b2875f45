"""Weights that are cast once: which, and that it changes no bit."""

import pytest
import torch
from torch import Tensor, nn

from kanlm.kan import BSpline, Hermite, KANLinear
from kanlm.kan.casts import cast_once, kept


def narrow(weight: Tensor) -> Tensor:
    return kept(lambda: weight.to(torch.bfloat16), torch.bfloat16, weight)


def test_a_weight_is_cast_once_until_it_is_written_to_or_the_block_is_left() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    assert narrow(weight) is not narrow(weight)
    with cast_once():
        first = narrow(weight)
        assert narrow(weight) is first
        assert narrow(weight.detach()) is first
        assert narrow(weight.T).shape == (4, 3)
        with torch.no_grad():
            weight.mul_(2)
        assert torch.equal(narrow(weight), weight.to(torch.bfloat16))
        with cast_once():
            assert narrow(weight) is not narrow(nn.Parameter(weight.detach().clone()))
    assert narrow(weight) is not narrow(weight)


def test_another_weight_that_comes_to_lie_there_is_cast_itself() -> None:
    with cast_once():
        for value in range(50):
            weight = torch.full((1000,), float(value))
            assert (narrow(weight) == value).all()
            del weight


def test_what_is_not_narrowed_is_not_kept() -> None:
    weight = torch.randn(3)
    with cast_once():
        assert kept(weight.clone, torch.float32, weight) is not kept(
            weight.clone, torch.float32, weight
        )


@pytest.mark.parametrize("basis", [Hermite(), BSpline()], ids=["hermite", "bspline"])
@pytest.mark.parametrize("base", [None, "silu"])
def test_gradients_of_several_passes_have_the_same_bits(basis, base) -> None:
    torch.manual_seed(0)
    layer = KANLinear(6, 5, basis=basis, base=base)
    mixer = nn.Linear(5, 5)
    inputs = torch.randn(3, 7, 6)

    def gradients() -> list[Tensor]:
        parameters = [*layer.parameters(), *mixer.parameters()]
        for parameter in parameters:
            parameter.grad = None
        for x in inputs:
            with torch.autocast("cpu", torch.bfloat16):
                loss = mixer(layer(x)).square().sum()
            loss.backward()
        return [parameter.grad for parameter in parameters if parameter.grad is not None]

    apart = gradients()
    with cast_once():
        together = gradients()
    for mine, theirs in zip(together, apart, strict=True):
        assert torch.equal(mine, theirs)
