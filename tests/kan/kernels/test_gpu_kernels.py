"""Kernels compiled for GPUs that are not here: what `scripts/gpu_kernels` asks of each build."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="there is no triton but for Linux"
)

SCRIPT = Path(__file__).parents[3] / "scripts" / "gpu_kernels.py"
slow = pytest.mark.slow


def compile_for(tmp_path: Path, *options: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    environment = {name: value for name, value in os.environ.items() if "TRITON" not in name}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    lines = tmp_path / "builds.jsonl"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--jsonl", str(lines), *options],
        env=environment,
        capture_output=True,
        text=True,
    )
    return done, [json.loads(line) for line in lines.read_text().splitlines()]


@pytest.mark.parametrize(
    ("architecture", "basis", "dtype", "kernels"),
    [
        ("90", "hermite3", "bf16", ["sums"]),
        pytest.param("90", "hermite3", "fp16", [], marks=slow),
        pytest.param("90", "hermite3", "tf32", [], marks=slow),
        pytest.param("90", "bspline1-g6", "bf16", [], marks=slow),
        pytest.param("90", "bspline3-g6", "bf16-autocast", [], marks=slow),
        pytest.param("80", "hermite3", "bf16", [], marks=slow),
        pytest.param("80", "bspline3-g6", "tf32", [], marks=slow),
    ],
)
def test_every_configuration_that_is_offered_is_as_it_should_be(
    architecture, basis, dtype, kernels, tmp_path
) -> None:
    """No spills, no product that waits for another, and work that overlaps."""
    some = ["--kernel", *kernels] if kernels else []
    options = ["--architecture", architecture, "--basis", basis, "--dtype", dtype, *some]
    done, found = compile_for(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    assert {one["kernel"] for one in found} == (
        set(kernels) or {"sums", "input_gradients", "coefficient_gradients"}
    )
    for one in found:
        assert one["error"] is None
        assert one["products"] > 0
        assert one["spills"] == 0
        assert one["serialised"] == []
        assert one["pending" if architecture == "90" else "copies"] >= 1
    for kernel in {one["kernel"] for one in found}:
        tiles = [sorted(one["tile"]) for one in found if one["kernel"] == kernel]
        assert any(short >= 64 and long >= 128 for short, long in tiles)


FAULTY = """
import sys
sys.path.insert(0, sys.argv[1])
import gpu_kernels, triton
case = gpu_kernels.Case(90, "coefficient_gradients", "hermite3", "bf16")
sizes = {"TOGETHER": 1, "TOKENS": 32, "IN": 64, "OUT": 256, "AHEAD": 2}
(one,) = gpu_kernels.builds(case, [triton.Config(sizes, num_warps=4, num_stages=1)])
print(gpu_kernels.faults([one]))
"""


def test_a_faulty_configuration_is_found_out(tmp_path) -> None:
    environment = {name: value for name, value in os.environ.items() if "TRITON" not in name}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", FAULTY, str(SCRIPT.parent)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "spills" in done.stdout
    assert "serialises products" in done.stdout
