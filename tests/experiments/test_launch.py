"""Runs of a study as real processes, side by side."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from kanlm.config import Config, from_tree
from kanlm.errors import Interrupted, UserError
from kanlm.experiments import launch
from kanlm.experiments.launch import run_chains
from kanlm.training.progress import figures
from kanlm.training.resolve import resolve


@pytest.fixture
def configs(tmp_path: Path, make_tree: Any) -> list[Config]:
    """Two tiny runs of different kinds."""
    return [
        resolve(
            from_tree(
                make_tree(tmp_path, output_dir=str(tmp_path / kind), model={"feed_forward": kind})
            )
        )
        for kind in ("gelu", "swiglu")
    ]


def start(chains: list[list[Config]], root: Path, parallel: int = 2) -> None:
    run_chains(chains, parallel=parallel, launcher=None, root=root)


@pytest.mark.slow
def test_runs_side_by_side_overlap_and_share_the_threads(
    configs: list[Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    folders = [Path(config.output_dir) for config in configs]
    side_by_side = threading.Event()

    def watch() -> None:
        """A run's log begins with its process, its results end it."""
        while not all((folder / "results.json").exists() for folder in folders):
            running = [(folder / "log.txt").exists() for folder in folders]
            if all(running) and not any((folder / "results.json").exists() for folder in folders):
                side_by_side.set()
            time.sleep(0.02)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start([[config] for config in configs], tmp_path)
    watcher.join(timeout=10)
    assert side_by_side.is_set()
    for folder in folders:
        hardware = json.loads((folder / "results.json").read_text())["provenance"]["hardware"]
        assert hardware["threads"] == max(1, (cores or 1) // 2)
        assert "parameters" in (folder / "log.txt").read_text()


def test_a_chain_waits_for_its_earlier_runs(configs: list[Config], tmp_path: Path) -> None:
    start([configs], tmp_path)
    first, second = (Path(config.output_dir) for config in configs)
    written = (first / "results.json").stat().st_mtime
    assert written <= (second / "metrics.jsonl").stat().st_mtime


def test_a_failed_run_is_named_with_its_log(
    configs: list[Config], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad, good = configs
    words = Path(str(bad.data.sources[0]["path"]))
    (Path(bad.output_dir)).mkdir()
    (Path(bad.output_dir) / "config.yaml").write_text(yaml.safe_dump({"model": {"d_model": 3}}))
    with pytest.raises(UserError, match="holds a run with"):
        start([[bad], [good]], tmp_path)
    (Path(bad.output_dir) / "config.yaml").unlink()
    Path(bad.output_dir).rmdir()
    words.rename(tmp_path / "gone.txt")
    with pytest.raises(UserError, match=r"(gelu|swiglu) ended with exit code 2, see .*log\.txt"):
        start([[bad], [good]], tmp_path)
    assert "no such file" in capfd.readouterr().err


@pytest.mark.parametrize("parallel", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_runs_start_up_stops_the_study(
    number: int, parallel: int, configs: list[Config], tmp_path: Path
) -> None:
    """They do not take signals yet, as this stand-in never does: it imports for a minute."""
    started = tmp_path / "started"
    program = f"import pathlib, time; pathlib.Path({str(started)!r}).touch(); time.sleep(60)"
    launcher = shlex.join([sys.executable, "-c", program])

    def interrupt() -> None:
        while not started.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Interrupted) as caught:
        run_chains(
            [[config] for config in configs], parallel=parallel, launcher=launcher, root=tmp_path
        )
    assert caught.value.exit_code == 128 + number


@pytest.mark.parametrize("parallel", [1, 2])
def test_a_signal_between_two_runs_reaches_the_one_being_started(
    parallel: int, configs: list[Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_process = subprocess.Popen
    started: list[subprocess.Popen] = []

    def start_and_signal(*words: Any, **settings: Any) -> Any:
        started.append(start_process(*words, **settings))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    monkeypatch.setattr("kanlm.experiments.launch.subprocess.Popen", start_and_signal)
    launcher = shlex.join([sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(Interrupted):
        run_chains([[configs[0]]], parallel=parallel, launcher=launcher, root=tmp_path)
    assert [process.returncode for process in started] == [-signal.SIGTERM]


@pytest.mark.slow
def test_an_interrupted_study_saves_every_run_and_goes_on(tmp_path: Path, make_tree: Any) -> None:
    """SIGTERM to the study alone stops both runs at a checkpoint."""
    arms = {"gelu": {}, "swiglu": {"model": {"feed_forward": "swiglu"}}}
    tree = make_tree(
        tmp_path,
        model={"feed_forward": "gelu"},
        training={"steps": 3000, "log_every": 1, "evaluate_every": None, "checkpoint_every": None},
        study={"arms": arms, "parallel_runs": 2},
    )
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "kanlm", "compare", str(path)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    places = [tmp_path / "run" / arm / "seed-0" / "stage-0-words" for arm in arms]
    while process.poll() is None and not all(_steps(place) > 2 for place in places):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert error == "kanlm: stopped and saved; rerun the same command to resume\n"
    for place in places:
        assert (place / "checkpoints" / "latest").exists()
        assert not (place / "results.json").exists()
    steps = [_steps(place) for place in places]
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert all(_steps(place) == 3000 > before for place, before in zip(places, steps, strict=True))


def _steps(place: Path) -> int:
    metrics = place / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


TRAINED = {"kind": "train", "step": 3, "loss": 2.5, "bits_per_byte": 3.5, "tokens_per_second": 9.0}


@pytest.mark.parametrize(
    "last",
    [
        b'{"kind": "train", "step": 4, "lo',
        b'{"kind": "train", "step": 4}\n',
        json.dumps({**TRAINED, "loss": "low"}).encode() + b"\n",
        json.dumps({**TRAINED, "step": None}).encode() + b"\n",
        b'{"kind": "train", "step": \xff}\n',
    ],
)
def test_a_bar_shows_the_last_line_that_can_be_shown(last: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n" + json.dumps(TRAINED).encode() + b"\n" + last)
    line = launch._last_training_line(path)
    assert line is not None
    assert line == TRAINED
    assert "loss 2.500 nats" in figures(line)


def test_how_far_a_study_is(
    configs: list[Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of runs that are over, whenever that was, and of those in progress."""
    clock = [100.0]
    monkeypatch.setattr(launch.time, "monotonic", lambda: clock[0])
    runs = [
        replace(configs[0], output_dir=str(tmp_path / name), training=replace(training, steps=100))
        for name, training in zip("abcd", [configs[0].training] * 4, strict=True)
    ]
    whole = launch.StudyProgress(runs)
    whole.end(runs[0], now=False)
    assert whole.position(runs[1]) == "run 2 of 4"
    assert whole.seconds_left([]) is None
    (tmp_path / "b").mkdir()
    log = tmp_path / "b" / "metrics.jsonl"
    log.write_text(json.dumps({**TRAINED, "step": 50}) + "\n")
    clock[0] += 25.0
    # Half a second a step, of which there are 50 and 200 to come.
    assert whole.seconds_left([runs[1]]) == pytest.approx(125.0)
    clock[0] += 25.0
    whole.end(runs[1])
    assert whole.position(runs[2]) == "run 3 of 4"
    assert whole.seconds_left([]) == pytest.approx(100.0)
    # A resumed run's steps before this start took none of its time.
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "metrics.jsonl").write_text(json.dumps({**TRAINED, "step": 90}) + "\n")
    assert whole.position(runs[3]) == "run 4 of 4"
    assert whole.seconds_left(runs[2:]) == pytest.approx(0.5 * 110)


def test_a_long_line_of_figures_is_found(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({**TRAINED, "use": [0.5] * 20_000}) + "\n")
    line = launch._last_training_line(path)
    assert line is not None
    assert line["step"] == 3
