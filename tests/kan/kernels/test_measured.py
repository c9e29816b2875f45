"""Timing backends before training: what is chosen, and that nothing else changes."""

import warnings

import pytest
import torch
from torch import nn

from kanlm.kan import BSpline, Hermite, KANLinear, Rational, cpp_build
from kanlm.kan.kernels import cpu_gemm, dispatch, measured, prefer_backend, use_backend
from kanlm.kan.kernels.measured import fastest_backend

native_only = pytest.mark.skipif(
    cpp_build.obstacle() is not None, reason=f"no native kernels: {cpp_build.obstacle()}"
)


def model(*bases) -> nn.Module:
    return nn.ModuleList(KANLinear(12, 16, basis=basis) for basis in bases)


@native_only
def test_both_are_timed_and_the_faster_one_is_taken(monkeypatch) -> None:
    found = fastest_backend(model(Hermite(), BSpline()), tokens=64)
    assert set(found.seconds) == {"recompute", "torch"}
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert found.tokens == 64
    slow = {"recompute": 3.0, "torch": 2.0}
    monkeypatch.setattr(measured, "_interleaved", lambda run, able, device: slow)
    assert fastest_backend(model(Hermite()), tokens=64).backend == "torch"
    slow["torch"] = 2.9
    assert fastest_backend(model(Hermite()), tokens=64).backend == "recompute"


@native_only
def test_no_number_and_no_random_state_changes() -> None:
    torch.manual_seed(0)
    layers = model(Hermite(), BSpline(), Rational(12))
    before = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
    state = torch.get_rng_state()
    fastest_backend(layers, tokens=64)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layers.state_dict().items())
    assert all(parameter.grad is None for parameter in layers.parameters())


@pytest.mark.parametrize(
    ("layers", "autocast"),
    [(nn.Linear(3, 3), None), (model(Rational(12)), None), (model(Hermite()), torch.bfloat16)],
)
def test_where_there_is_nothing_to_choose_nothing_is_timed(layers, autocast) -> None:
    found = fastest_backend(layers, tokens=64, autocast=autocast)
    assert found == ("recompute", {}, 0, {})


@native_only
def test_large_layers_are_timed_on_fewer_tokens() -> None:
    found = fastest_backend(nn.ModuleList([KANLinear(512, 512)]), tokens=100_000)
    assert found.tokens < 1000


@native_only
def test_a_kernel_that_fails_is_left_out_with_one_warning(monkeypatch) -> None:
    def fail(*arguments) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(cpu_gemm, "sums", fail)
    with pytest.warns(UserWarning, match="'recompute' are not used: .*no kernel image") as caught:
        found = fastest_backend(model(Hermite(), Hermite()), tokens=64)
    assert len(caught) == 1
    assert found.backend == "torch"
    assert list(found.failed) == ["recompute"]
    with pytest.warns(UserWarning, match="not used"):
        found = fastest_backend(model(Hermite()), tokens=64, candidates=["recompute"])
    assert found.seconds == {}


def test_a_backend_that_no_layer_can_take_is_said() -> None:
    with pytest.warns(UserWarning, match="'triton' are not used: has formulas for polynomials"):
        found = fastest_backend(model(Rational(12)), tokens=64, candidates=["triton"])
    assert found.backend == "recompute"


@native_only
@pytest.mark.slow
def test_compiled_passes_are_timed_compiled() -> None:
    found = fastest_backend(model(Hermite()), tokens=64, compiled=True)
    assert set(found.seconds) == {"recompute", "torch"}


@native_only
def test_torch_alone_agrees_and_calls_no_cpp(monkeypatch) -> None:
    layer, x = KANLinear(8, 5), torch.randn(70, 8, requires_grad=True)
    inputs = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x).square().sum(), inputs)
    monkeypatch.setattr(cpu_gemm, "sums", None)
    monkeypatch.setattr(cpu_gemm, "gradients", None)
    with use_backend("torch"):
        got = torch.autograd.grad(layer(x).square().sum(), inputs)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_preference_is_for_layers_that_can() -> None:
    x = torch.randn(70, 12)
    with warnings.catch_warnings(), prefer_backend("torch"):
        for basis, expected in ((Hermite(), "torch"), (Rational(12), "reference")):
            layer = KANLinear(12, 5, basis=basis)
            assert dispatch._backend(x, layer.coefficients, layer.basis) == expected
    with pytest.raises(ValueError, match="'few': expected reference"):
        prefer_backend("few").__enter__()  # pyright: ignore[reportArgumentType]
