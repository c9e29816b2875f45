"""The script that compares two versions finds what differs, and nothing else."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def golden():
    spec = importlib.util.spec_from_file_location("golden", ROOT / "scripts" / "golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["golden"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runs(finished_runs: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two copies of one finished run."""
    for name in ("old", "new"):
        shutil.copytree(finished_runs / "kan", tmp_path / name)
    return tmp_path / "old", tmp_path / "new"


def rewrite_log(run: Path, change) -> None:
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(line)) + "\n" for line in lines))


def test_copies_do_not_differ(golden, runs):
    assert golden.compare("x", *runs).differences == []


def test_the_last_bit_of_one_weight_is_found(golden, runs):
    path = runs[1] / "model" / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("coefficients"))
    weights[name].flat[3] = np.nextafter(weights[name].flat[3], np.float32(9))
    save_file(weights, path, metadata={"format": "pt"})
    (found,) = golden.compare("x", *runs).differences
    assert found.startswith(f"{name}: largest difference")


def test_a_logged_loss_that_differs_is_found_and_times_are_not(golden, runs):
    old, new = runs
    rewrite_log(new, lambda line: {**line, **({"seconds": 9.0} if "seconds" in line else {})})
    assert golden.compare("x", old, new).differences == []
    rewrite_log(new, lambda line: {**line, **({"loss": 1.0} if line["kind"] == "train" else {})})
    (found,) = golden.compare("x", old, new).differences
    assert found.startswith("train line of step 3: loss")


@pytest.mark.slow
def test_a_version_trains_to_the_same_bits_as_itself():
    done = subprocess.run(
        [sys.executable, "scripts/golden.py", "HEAD", "--only", "kan-2", "resumed"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 cases the same bit for bit" in done.stdout
