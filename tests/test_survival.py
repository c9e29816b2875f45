"""The scripts that look for what a run does not survive, on a few cases each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kanlm.faults import POINTS

ROOT = Path(__file__).parents[1]


def script(name: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def layout(row: dict) -> tuple[int, str]:
    return row["layout"]["processes"], row["layout"]["sharding"]


def test_a_killed_run_ends_with_the_same_weights(tmp_path: Path):
    words = ["--kills", "2", "--visits", "1", "--no-damage", "--no-signals", "--no-quickstart"]
    points = ["inside-checkpoint-write", "inside-grid-change"]
    script("chaos.py", *words, "--points", *points, "--output", str(tmp_path / "chaos.md"))
    rows = json.loads((tmp_path / "chaos.json").read_text())
    assert {row["fault"].split(",")[0] for row in rows} == {"a random instant", *points}
    assert {layout(row) for row in rows} == {(1, "none"), (2, "none"), (2, "full")}
    assert all(row["injected"] == row["identical"] > 0 for row in rows)


def test_a_signal_or_time_limit_saves_and_exits_alike_in_both_processes(tmp_path: Path):
    words = ["--kills", "0", "--points", "--no-damage", "--layouts", "two", "--no-quickstart"]
    script("chaos.py", *words, "--output", str(tmp_path / "chaos.md"))
    rows = json.loads((tmp_path / "chaos.json").read_text())
    told = {row["fault"]: row["identical"] for row in rows if row["injected"]}
    assert told == {
        "SIGTERM, exit code 143": 2,
        "SIGINT, exit code 130": 2,
        "SIGUSR1, exit code 138": 2,
        "the time limit, exit code 75": 1,
    }


def test_damaged_files_are_refused_in_a_line():
    assert "700 inputs" in script("fuzz.py", "--inputs", "700")


def test_the_published_table_holds_every_fault():
    rows = json.loads((ROOT / "scripts" / "chaos.json").read_text())
    quickstart = rows.pop()
    assert quickstart["kills"] == 2
    assert abs(quickstart["killed"] - quickstart["undisturbed"]) <= 0.005
    for processes, sharding in [(1, "none"), (2, "none"), (2, "full")]:
        ours = [row for row in rows if layout(row) == (processes, sharding)]
        for name in POINTS:
            times = [r["injected"] for r in ours if r["fault"].split(",")[0] == name]
            assert times, name
            assert min(times) >= 3, name
        (anywhere,) = [row for row in ours if row["fault"] == "a random instant"]
        assert anywhere["injected"] >= 50
    assert all(row["identical"] == row["injected"] for row in rows)


@pytest.mark.slow
def test_damaged_checkpoints_and_every_point(tmp_path: Path):
    words = [
        "--kills",
        "4",
        "--visits",
        "1",
        "--no-quickstart",
        "--output",
        str(tmp_path / "chaos.md"),
    ]
    script("chaos.py", *words)
