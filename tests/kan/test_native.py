"""Compiling: once, into a folder that can be written, and never at the price of an error."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kanlm.kan import Hermite, native
from kanlm.kan.kernels import sparse

native_only = pytest.mark.skipif(
    native.obstacle() is not None, reason=f"no native kernels: {native.obstacle()}"
)


@native_only
def test_a_source_that_does_not_compile_warns(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "broken.cpp"
    source.write_text("this is no C++")
    with pytest.warns(UserWarning, match=r"broken\.cpp is not compiled"):
        assert native.load_library(source) is None
    assert not list(tmp_path.rglob("*.so"))


@native_only
def test_a_library_is_compiled_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int one() { return 1; }')
    library = native.load_library(source)
    assert library is not None
    assert library.one() == 1
    (kept,) = tmp_path.rglob("*.so")
    before = kept.stat().st_mtime_ns
    native.load_library.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.load_library(source) is not None
    assert kept.stat().st_mtime_ns == before


@native_only
def test_a_cache_that_cannot_be_written_warns(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    source = tmp_path / "two.cpp"
    source.write_text('extern "C" int two() { return 2; }')
    with pytest.warns(UserWarning, match=r"two\.cpp is not compiled, and is slower for it"):
        assert native.load_library(source) is None


def test_it_can_be_left_out(monkeypatch) -> None:
    monkeypatch.setenv("KANLM_NATIVE", "0")
    native.obstacle.cache_clear()
    try:
        assert native.obstacle() == "KANLM_NATIVE is 0"
    finally:
        native.obstacle.cache_clear()


def test_tensors_without_numbers_are_left_to_torch() -> None:
    with FakeTensorMode():
        x = torch.randn(4, 8)
        formulas = Hermite().formulas()
        assert formulas is not None
        assert not formulas.can(x)
        assert sparse._native(x) is None
        values = torch.empty(4, 3, 8)
        Hermite().write_values(x, values)
