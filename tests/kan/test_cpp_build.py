"""Compiling: once, into a folder that can be written, and never at the price of an error."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch._subclasses.fake_tensor import FakeTensorMode

from kanlm.kan import Hermite, cpp_build
from kanlm.kan.kernels import few_tokens

native_only = pytest.mark.skipif(
    cpp_build.obstacle() is not None, reason=f"no native kernels: {cpp_build.obstacle()}"
)


@pytest.fixture(autouse=True)
def not_warned(monkeypatch) -> None:
    monkeypatch.setattr(cpp_build, "_warned", False)


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@native_only
def test_a_source_that_does_not_compile_warns(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "broken.cpp"
    source.write_text("this is no C++")
    with pytest.warns(UserWarning, match=r"broken\.cpp is not compiled"):
        assert cpp_build.load_library(source) is None
    assert not list(tmp_path.rglob("*.so"))


@native_only
def test_a_library_is_compiled_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int one() { return 1; }')
    library = cpp_build.load_library(source)
    assert library is not None
    assert library.one() == 1
    (kept,) = tmp_path.rglob("*.so")
    before = kept.stat().st_ino
    cpp_build.load_library.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpp_build.load_library(source) is not None
    assert kept.stat().st_ino == before


@native_only
def test_a_damaged_library_is_made_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "three.cpp"
    source.write_text('extern "C" int three() { return 3; }')
    assert cpp_build.load_library(source, "three") is not None
    (kept,) = tmp_path.rglob("*.so")
    kept.unlink()  # what is loaded must not change under the process
    kept.write_bytes(b"no library")
    cpp_build.load_library.cache_clear()
    library = cpp_build.load_library(source, "three")
    assert library is not None
    assert library.three() == 3


@native_only
def test_a_library_without_its_functions_warns(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "four.cpp"
    source.write_text('extern "C" int four() { return 4; }')
    with pytest.warns(UserWarning, match=r"four\.cpp is not compiled.*has no function five"):
        assert cpp_build.load_library(source, "four", "five") is None


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
@pytest.mark.parametrize(
    "what",
    [*BROKEN, "no program", "no words", "no cache", "no home", "relative home", "locked for long"],
)
def test_whatever_is_wrong_is_one_warning(tmp_path, monkeypatch, stack, what) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if what in BROKEN:
        monkeypatch.setenv("CXX", write_compiler(tmp_path, BROKEN[what]))
    if what == "no program":
        monkeypatch.setenv("CXX", "no-such-compiler -O1")
    if what == "no words":
        monkeypatch.setenv("CXX", "g++ 'unclosed")
    if what == "relative home":
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        monkeypatch.setenv("HOME", ".")
    if what == "locked for long":
        monkeypatch.setattr(cpp_build, "_COMPILE_SECONDS", 0.1)
        monkeypatch.setattr(cpp_build, "_fingerprint", lambda *_: "0")
        stack.enter_context(FileLock(cpp_build.cache_folder("kernels") / "six.lock"))
        stack.enter_context(FileLock(cpp_build.cache_folder("kernels") / "seven.lock"))
    if what == "no cache":
        (tmp_path / "cache").touch()
    if what == "no home":
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
        (tmp_path / "file").touch()
    sources = [tmp_path / "six.cpp", tmp_path / "seven.cpp"]
    for source in sources:
        source.write_text('extern "C" int number() { return 6; }')
    with pytest.warns(UserWarning, match=r"six\.cpp is not compiled; torch's ") as caught:
        assert [cpp_build.load_library(source, "number") for source in sources] == [None, None]
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
    assert done.stderr.count("is not compiled; torch's slower operators") == 1, done.stderr


@native_only
def test_a_processor_that_is_not_described_warns(tmp_path, monkeypatch) -> None:
    def unreadable() -> bytes:
        raise FileNotFoundError("/proc/cpuinfo")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpp_build, "processor", unreadable)
    source = tmp_path / "six.cpp"
    source.write_text('extern "C" int six() { return 6; }')
    with pytest.warns(UserWarning, match=r"six\.cpp is not compiled; .* /proc/cpuinfo"):
        assert cpp_build.load_library(source) is None


@native_only
def test_a_compiler_may_have_options(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "seven.cpp"
    source.write_text('extern "C" int seven() { return NUMBER; }')
    for number in (7, 77):
        monkeypatch.setenv("CXX", f"g++ -DNUMBER={number}")
        cpp_build.load_library.cache_clear()
        library = cpp_build.load_library(source)
        assert library is not None
        assert library.seven() == number


def open_to_others(folder: Path) -> None:
    folder.chmod(0o777)


def give_away(folder: Path) -> None:
    os.chown(folder, 12345, -1)


@native_only
@pytest.mark.parametrize("change", [open_to_others, give_away])
def test_a_folder_of_others_is_not_loaded_from(tmp_path, monkeypatch, change) -> None:
    """Neither what is there already nor what would be compiled into it."""
    if change is give_away and os.geteuid() != 0:
        pytest.skip("only root gives folders away")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "eight.cpp"
    source.write_text('extern "C" int eight() { return 8; }')
    assert cpp_build.load_library(source) is not None
    (library,) = tmp_path.rglob("*.so")
    change(library.parent)
    cpp_build.load_library.cache_clear()
    message = "other users may write" if change is open_to_others else "belongs to user 12345"
    with pytest.warns(UserWarning, match=message):
        assert cpp_build.load_library(source) is None


@native_only
def test_a_library_that_others_may_write_to_is_compiled_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "nine.cpp"
    source.write_text('extern "C" int nine() { return 9; }')
    old = os.umask(0)  # what is made is private whatever the user's mask says
    try:
        assert cpp_build.load_library(source) is not None
    finally:
        os.umask(old)
    (library,) = tmp_path.rglob("*.so")
    assert library.stat().st_mode & 0o777 == 0o700
    assert library.parent.stat().st_mode & 0o777 == 0o700
    before = library.stat().st_ino
    library.chmod(0o777)
    cpp_build.load_library.cache_clear()
    assert cpp_build.load_library(source) is not None
    assert library.stat().st_ino != before


#: A compiler that counts its calls, of which each takes a moment.
COUNTING = """
[ "$1" = --version ] && exec g++ "$@"
echo >> "$(dirname "$0")/calls"
sleep 0.5
exec g++ "$@"
"""

LOAD = (
    "import sys; from pathlib import Path; from kanlm.kan import cpp_build\n"
    "assert cpp_build.load_library(Path(sys.argv[1])).ten() == 10"
)


def start_loading(source: Path, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", LOAD, str(source)],
        env={**os.environ, "XDG_CACHE_HOME": str(source.parent / "cache"), **environment},
        start_new_session=True,
    )


@native_only
def test_one_process_compiles_and_the_others_wait(tmp_path) -> None:
    compiler = write_compiler(tmp_path, COUNTING)
    source = tmp_path / "ten.cpp"
    source.write_text('extern "C" int ten() { return 10; }')
    processes = [start_loading(source, CXX=compiler) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "calls").read_text() == "\n"


@native_only
def test_a_killed_compiler_lets_the_next_one_in(tmp_path) -> None:
    hanging = '[ "$1" = --version ] && exec g++ "$@"; touch "$(dirname "$0")/begun"; sleep 600'
    source = tmp_path / "ten.cpp"
    source.write_text('extern "C" int ten() { return 10; }')
    killed = start_loading(source, CXX=write_compiler(tmp_path, hanging))
    while not (tmp_path / "begun").exists():
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert start_loading(source).wait() == 0


@native_only
def test_what_has_long_been_unused_is_removed(tmp_path, monkeypatch) -> None:
    """When another library is compiled: not what was loaded lately, however old it is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    then = time.time() - 31 * 24 * 60 * 60
    names = ("twelve", "thirteen", "fourteen")
    for name in names:
        (tmp_path / f"{name}.cpp").write_text(f'extern "C" int {name}() {{ return 0; }}')
    for name in names[:2]:
        assert cpp_build.load_library(tmp_path / f"{name}.cpp") is not None
    folder = cpp_build.cache_folder("kernels")
    (folder / "tmpabandoned").mkdir()
    for path in folder.iterdir():
        os.utime(path, (then, then))
    cpp_build.load_library.cache_clear()
    for name in names[1:]:
        assert cpp_build.load_library(tmp_path / f"{name}.cpp") is not None
    assert sorted(path.stem.split("-")[0] for path in folder.glob("*.so")) == [
        "fourteen",
        "thirteen",
    ]
    assert not (folder / "tmpabandoned").exists()


def test_it_can_be_left_out(monkeypatch) -> None:
    monkeypatch.setenv("KANLM_NATIVE", "0")
    cpp_build.obstacle.cache_clear()
    try:
        assert cpp_build.obstacle() == "KANLM_NATIVE is 0"
    finally:
        cpp_build.obstacle.cache_clear()


def test_tensors_without_numbers_are_left_to_torch() -> None:
    with FakeTensorMode():
        x = torch.randn(4, 8)
        formulas = Hermite().cpp_formulas()
        assert formulas is not None
        assert not formulas.can(x)
        edges = few_tokens.Edges(torch.randn(8, 3, 4), Hermite())
        assert few_tokens._sums_by_cpp(x, edges) is None
        values = torch.empty(4, 3, 8)
        Hermite().write_values(x, values)
