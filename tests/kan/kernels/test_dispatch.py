"""Which backend a layer takes, and what one asks for in vain."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from kanlm.kan import RBF, BSpline, Chebyshev, Hermite, KANLinear, Rational, decoding
from kanlm.kan.kernels import BACKENDS, dispatch, fused, use_backend


@pytest.mark.parametrize(
    ("basis", "tokens", "gradients", "expected"),
    [
        (Hermite(), 100, True, "recompute"),
        (Hermite(), 64, False, "few"),
        (Hermite(), 65, False, "recompute"),
        (Rational(), 1, False, "few"),
        (BSpline(), 100, True, "recompute"),
        (BSpline(), 1, True, "recompute"),
        (BSpline(), 1, False, "few"),
        (BSpline(degree=3), 1, False, "few"),
        (BSpline(), 10_000, False, "recompute"),
        (BSpline(degree=3), 100, True, "recompute"),
        (Rational(), 100, True, "reference"),
    ],
)
def test_what_is_taken_by_itself(basis, tokens, gradients, expected) -> None:
    layer = KANLinear(8, 4, basis=basis)
    x = torch.randn(tokens, 8)
    with torch.set_grad_enabled(gradients):
        with decoding(layer):
            assert dispatch._backend(x, layer.coefficients, layer.basis) == expected
        # Outside nothing reads memory unasked.
        assert dispatch._backend(x, layer.coefficients, layer.basis) != "few"


def test_gpus_are_left_to_torch() -> None:
    """Whatever the number of tokens, until Triton's kernels have been timed on one."""
    layer = KANLinear(8, 4).bfloat16()
    for tokens, expected in ((1, "few"), (10_000, "recompute")):
        x = torch.empty(tokens, 8, device="meta", dtype=torch.bfloat16)
        with torch.no_grad(), decoding(layer):
            assert dispatch._backend(x, layer.coefficients, layer.basis) == expected


@pytest.mark.parametrize("backend", [each for each in BACKENDS if each != "triton"])
def test_backends_agree(backend) -> None:
    layer = KANLinear(8, 4, basis=BSpline(), bias=True).double()
    x = 2 * torch.randn(3, 5, 8, dtype=torch.float64)
    with torch.no_grad(), use_backend("reference"):
        expected = layer(x)
    with torch.no_grad(), use_backend(backend):
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("basis", "backend", "message"),
    [
        (Chebyshev(), "sparse", "takes local bases, and chebyshev4 is none"),
        (BSpline(), "sparse", "knows no gradients"),
        (Hermite(), "few", "knows no gradients"),
        (Rational(), "recompute", "knows no gradient of a basis's parameters"),
        (RBF(), "triton", "has formulas for polynomials and for B-splines.*is rbf7"),
        (BSpline(equal_cells=False), "triton", "has formulas for .* on one grid of equal cells"),
    ],
)
def test_a_backend_that_cannot_says_why(basis, backend, message) -> None:
    layer = KANLinear(8, 4, basis=basis)
    with use_backend(backend), pytest.raises(ValueError, match=f"backend = '{backend}' {message}"):
        layer(torch.randn(2, 8))


def test_without_triton_its_backend_says_so_and_nothing_else_needs_it(monkeypatch) -> None:
    layer, x = KANLinear(8, 4), torch.randn(100, 8)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(fused, "_missing", fused._missing.__wrapped__)
    with use_backend("triton"), pytest.raises(ValueError, match="needs triton, which is not"):
        layer(x)
    assert dispatch._backend(x, layer.coefficients, layer.basis) == "recompute"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there is no triton but for Linux")
def test_triton_is_for_gpus() -> None:
    """Unless its interpreter was asked for when it was imported, as these tests do."""
    code = (
        "import sys, torch; from kanlm.kan import KANLinear; "
        "from kanlm.kan.kernels import use_backend; KANLinear(8, 4)(torch.randn(100, 8)); "
        "assert 'triton' not in sys.modules\n"
        "with use_backend('triton'): KANLinear(8, 4)(torch.randn(2, 8))"
    )
    environment = {name: value for name, value in os.environ.items() if "TRITON" not in name}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert "backend = 'triton' is for NVIDIA GPUs" in done.stderr


def test_an_unknown_backend_is_refused_and_nested_ones_end() -> None:
    with pytest.raises(ValueError, match="backend = 'cuda': expected auto, reference"):
        use_backend("cuda").__enter__()  # pyright: ignore[reportArgumentType]
    with use_backend("reference"):
        with use_backend("recompute"):
            pass
        assert dispatch._chosen == "reference"
    assert dispatch._chosen == "auto"


def test_wrong_dtypes_are_torchs_own_error() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        KANLinear(8, 4)(torch.randn(2, 8, dtype=torch.float64))


def test_triton_s_tiles_are_not_for_deterministic_algorithms() -> None:
    layer, x = KANLinear(8, 4), torch.randn(100, 8)
    torch.use_deterministic_algorithms(True)
    try:
        found = fused.no_fused_sums(x, layer.coefficients, layer.basis)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found is not None
    assert "chooses tiles by timing" in found
