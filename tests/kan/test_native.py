"""Compiling: once, into a folder that can be written, and never at the price of an error."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kanlm.kan import Hermite, native
from kanlm.kan.kernels import few_tokens

native_only = pytest.mark.skipif(
    native.obstacle() is not None, reason=f"no native kernels: {native.obstacle()}"
)


@pytest.fixture(autouse=True)
def not_warned(monkeypatch) -> None:
    monkeypatch.setattr(native, "_warned", False)


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
def test_a_damaged_library_is_made_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "three.cpp"
    source.write_text('extern "C" int three() { return 3; }')
    assert native.load_library(source, "three") is not None
    (kept,) = tmp_path.rglob("*.so")
    kept.unlink()  # what is loaded must not change under the process
    kept.write_bytes(b"no library")
    native.load_library.cache_clear()
    library = native.load_library(source, "three")
    assert library is not None
    assert library.three() == 3


@native_only
def test_a_library_without_its_functions_warns(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "four.cpp"
    source.write_text('extern "C" int four() { return 4; }')
    with pytest.warns(UserWarning, match=r"four\.cpp is not compiled.*has no function five"):
        assert native.load_library(source, "four", "five") is None


def write_compiler(folder: Path, script: str) -> str:
    compiler = folder / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    return str(compiler)


BROKEN = {
    "version": "exit 1",
    "compile": '[ "$1" = --version ]',
    "nonsense": "printf '\\377\\376'; printf '\\377\\376' >&2; [ \"$1\" = --version ]",
    "no file": "exit 0",
    "no library": 'for last; do :; done; [ "$1" = --version ] || echo no > "$last"',
}


@native_only
@pytest.mark.parametrize("what", [*BROKEN, "no cache", "no home"])
def test_whatever_is_wrong_is_one_warning(tmp_path, monkeypatch, what) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if what in BROKEN:
        monkeypatch.setenv("CXX", write_compiler(tmp_path, BROKEN[what]))
    if what == "no cache":
        (tmp_path / "cache").touch()
    if what == "no home":
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
        (tmp_path / "file").touch()
    sources = [tmp_path / "six.cpp", tmp_path / "seven.cpp"]
    for source in sources:
        source.write_text('extern "C" int number() { return 6; }')
    with pytest.warns(UserWarning, match=r"six\.cpp is not compiled, and torch's op") as caught:
        assert [native.load_library(source, "number") for source in sources] == [None, None]
    assert len(caught) == 1


@native_only
@pytest.mark.parametrize("what", ["broken", "none"])
def test_without_a_compiler_layers_compute_the_same(tmp_path, what) -> None:
    """Of two bases, forward and backward, in a process of its own."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": "/bin/false"}
    if what == "none":
        environment |= {"CXX": "", "PATH": str(tmp_path)}
    code = (
        "import torch; from kanlm.kan import BSpline, KANLinear\n"
        "for basis in (None, BSpline()):\n"
        "    layer = KANLinear(8, 5, basis=basis); x = torch.randn(70, 8, requires_grad=True)\n"
        "    y = layer(x); y.sum().backward()\n"
        "    torch.testing.assert_close(y, layer.double()(x.double()).float())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is not compiled, and torch's operators") == 1, done.stderr


@native_only
def test_a_processor_that_is_not_described_warns(tmp_path, monkeypatch) -> None:
    def unreadable() -> bytes:
        raise FileNotFoundError("/proc/cpuinfo")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_processor", unreadable)
    source = tmp_path / "six.cpp"
    source.write_text('extern "C" int six() { return 6; }')
    with pytest.warns(UserWarning, match=r"six\.cpp is not compiled, .* /proc/cpuinfo"):
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
        edges = few_tokens.Edges(torch.randn(8, 3, 4), Hermite())
        assert few_tokens._native_sums(x, edges) is None
        values = torch.empty(4, 3, 8)
        Hermite().write_values(x, values)
