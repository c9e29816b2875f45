"""What a result says of its making, against git and the configuration themselves."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kanlm.config import Config
from kanlm.experiments import provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_says_what_a_reader_needs_to_repeat_it() -> None:
    collected = provenance.collect(Config(), {"text": "abc"})
    assert json.loads(json.dumps(collected)) == collected
    assert collected["data_hash"] == {"text": "abc"}
    python = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    assert collected["versions"]["python"] == python
    assert set(provenance.PACKAGES) < set(collected["versions"])
    hardware = collected["hardware"]
    assert hardware["cores"] >= 1
    assert hardware["threads"] >= 1
    assert hardware["memory_bytes"] > 2**28
    # Processors of one name may be generations apart.
    assert f"({torch.backends.cpu.get_cpu_capability()})" in hardware["cpu"]


def test_commit_and_whether_the_tree_differs_from_it(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("one")
    assert provenance._commit(tmp_path) == (None, None)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert provenance._commit(tmp_path) == (commit, False)
    (tmp_path / "results.json").write_text("untracked output is no change of code")
    assert provenance._commit(tmp_path) == (commit, False)
    (tmp_path / "code.py").write_text("two")
    assert provenance._commit(tmp_path) == (commit, True)


def test_code_installed_inside_another_repository_has_no_commit(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "paper.tex").write_text("mine")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    installed = tmp_path / ".venv" / "kanlm"
    installed.mkdir(parents=True)
    assert provenance._commit(installed) == (None, None)


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance._commit(tmp_path) == (None, None)


def test_config_hash_follows_settings_and_not_the_folder() -> None:
    config = Config()
    same = replace(config, output_dir="elsewhere")
    assert provenance.config_hash(config) == provenance.config_hash(same)
    assert provenance.config_hash(config) != provenance.config_hash(replace(config, seed=1))
