"""What is said where Triton would find no compiler."""

from pathlib import Path

import pytest

from kanlm.kan.compilers import no_c_compiler
from kanlm.kan.kernels import fused


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine whose only programs are those put into this folder."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path


def program(path: Path) -> Path:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_either_compiler_will_do(bare: Path):
    assert "there is none" in (no_c_compiler() or "")
    program(bare / "clang")
    assert no_c_compiler() is None


def test_the_one_that_is_named_must_be_there(bare: Path, monkeypatch: pytest.MonkeyPatch):
    program(bare / "gcc")
    monkeypatch.setenv("CC", "icx")
    assert "CC = icx is none" in (no_c_compiler() or "")
    monkeypatch.setenv("CC", str(program(bare / "mine")))
    assert no_c_compiler() is None


def test_fused_kernels_are_not_chosen_without_one(bare: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *device: (9, 0))
    monkeypatch.setattr("torch.version.hip", None)
    missing = fused._missing.__wrapped__
    assert "needs a C compiler" in (missing("cuda") or "")
    program(bare / "gcc")
    assert missing("cuda") is None
