"""The list of runs: what it says of each state, and how little it reads for that."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from kanlm.cli import main
from kanlm.errors import UserError
from kanlm.experiments import runs
from kanlm.experiments.runs import list_runs, planned_runs
from kanlm.training.run_folder import lock_folder


@pytest.fixture
def folder(finished_runs: Path, tmp_path: Path) -> Path:
    """A copy of the finished runs."""
    return Path(shutil.copytree(finished_runs, tmp_path / "runs"))


def only(folder: Path, name: str) -> runs.Entry:
    (entry,) = [entry for entry in list_runs(folder) if Path(entry.path).name == name]
    return entry


def unfinish(run: Path, step: int) -> None:
    """As if it had stopped at a checkpoint."""
    shutil.rmtree(run / "model")
    (run / "results.json").unlink()
    for place in (run / "checkpoints").glob("step-*"):
        if int(place.name.removeprefix("step-")) > step:
            shutil.rmtree(place)


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


def test_finished_runs_are_listed_with_their_last_figures(folder):
    entry = only(folder, "kan")
    assert entry.describe() == "finished at step 12"
    ((label, facts),) = json.loads((folder / "kan" / "results.json").read_text())["arms"].items()
    assert (entry.arm, entry.seconds) == (label, facts["train_seconds"])
    train, validation = lines(folder / "kan", "train")[-1], lines(folder / "kan", "validation")[-1]
    assert entry.bits_per_byte == train["bits_per_byte"]
    assert entry.validation_bits_per_byte == validation["bits_per_byte"]


def test_a_stopped_run_stands_at_its_newest_checkpoint(folder):
    unfinish(folder / "kan", 8)
    assert only(folder, "kan").describe() == "stopped at step 8 of 12"
    assert only(folder, "kan").arm == "kan"
    shutil.rmtree(folder / "kan" / "checkpoints")
    assert only(folder, "kan").describe() == "stopped at step 0 of 12"


def test_a_run_whose_folder_is_held_is_running(folder):
    unfinish(folder / "kan", 8)
    with lock_folder(folder / "kan"):
        assert only(folder, "kan").describe() == "running at step 12 of 12"
        assert only(folder, "gelu").state == "finished"
    assert only(folder, "kan").state == "stopped"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "training: ["),
        ("config.yaml", "training: {steps: 3}"),
        ("results.json", "{"),
        ("results.json", "[]"),
        ("metrics.jsonl", "train\n"),
    ],
)
def test_what_is_damaged_is_said(name, content, folder):
    (folder / "kan" / name).write_text(content)
    entry = only(folder, "kan")
    assert entry.state == "damaged"
    assert entry.describe().startswith("damaged: ")
    assert only(folder, "gelu").state == "finished"


def test_the_last_written_comes_first(folder):
    for when, name in ((10, "gelu"), (20, "kan")):
        for path in (folder / name).iterdir():
            os.utime(path, (when, when))
    assert [Path(entry.path).name for entry in list_runs(folder)] == ["kan", "gelu"]


def test_of_metrics_only_the_end_is_read(folder, monkeypatch):
    path = folder / "kan" / "metrics.jsonl"
    expected = only(folder, "kan")
    path.write_bytes(b"x" * 10_000_000 + b"\n" + path.read_bytes())
    monkeypatch.setattr(runs, "_TAIL", 2**15)
    assert only(folder, "kan").bits_per_byte == expected.bits_per_byte
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    assert only(folder, "kan").bits_per_byte == expected.bits_per_byte


def test_checkpoints_and_models_are_not_opened(folder):
    for path in folder.rglob("*.safetensors"):
        path.unlink()
        path.mkdir()
    assert {entry.state for entry in list_runs(folder)} == {"finished"}


def study(folder: Path, finished_runs: Path, **settings: Any) -> Path:
    """A study with the run of its first arm in its place."""
    tree = yaml.safe_load((finished_runs / "kan" / "config.yaml").read_text())
    tree["study"] = {"arms": {"kan": {}, "gelu": {}}, "seeds": [0, 1], **settings}
    place = folder / "study"
    shutil.copytree(finished_runs / "kan", place / "kan" / "seed-0" / "stage-0-words")
    (place / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return place


def test_a_study_is_one_line_until_it_is_asked_for(tmp_path, finished_runs):
    place = study(tmp_path, finished_runs)
    (entry,) = list_runs(tmp_path)
    assert (entry.kind, entry.arm) == ("study", "kan, gelu")
    assert entry.describe() == "stopped after run 1 of 4"
    with lock_folder(place):
        assert list_runs(tmp_path)[0].describe() == "running, run 2 of 4"
    with lock_folder(place / "kan" / "seed-0" / "stage-0-words"):
        assert list_runs(tmp_path)[0].state == "running"
    (place / "results.json").write_text("{}")
    assert list_runs(tmp_path)[0].describe() == "finished, 1 runs"
    assert {entry.kind for entry in list_runs(place)} == {"study", "run"}


def test_the_chosen_trial_counts_once(tmp_path, finished_runs):
    place = study(tmp_path, finished_runs, grid={"optimizer.learning_rate": [1, 2, 3]})
    for name in ("1", "2"):
        shutil.copytree(finished_runs / "kan", place / "kan" / "trials" / name)
    # Six trials, then the second seed of both arms.
    assert list_runs(tmp_path)[0].describe() == "stopped after run 2 of 8"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 2),
        ({"seeds": [0, 1, 2]}, 6),
        ({"stages": [{}, {}]}, 6),
        ({"stages": [{}], "seeds": [0, 1], "grid": {"a": [1, 2], "b": [1, 2]}}, 2 * (4 + 1) + 4),
        ({"seeds": [0, 1, 2], "finalists": 1}, 2 + 2),
        ({"arm_grids": {"x": {"a": [1, 2, 3]}}}, 6),
    ],
)
def test_planned_runs_are_counted(settings, expected):
    assert planned_runs({"arms": {"x": {}, "y": {}}, **settings}) == expected


def test_the_command_prints_a_table_or_json(folder, capsys, monkeypatch):
    main(["runs", str(folder)])
    table = capsys.readouterr().out
    assert "finished at step 12" in table
    main(["runs", str(folder), "--json"])
    entries = json.loads(capsys.readouterr().out)
    assert {entry["state"] for entry in entries} == {"finished"}
    monkeypatch.chdir(folder.parent)
    main(["runs"])
    assert capsys.readouterr().out.count("finished at step 12") == 2
    (folder.parent / "empty").mkdir()
    main(["runs", "empty"])
    assert capsys.readouterr().out == "no runs below empty\n"
    for words, line in (
        (["nowhere"], "nowhere: no such folder"),
        (["runs", "more"], "unrecognized argument more"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["runs", *words])
        assert caught.value.code == 2
        assert line in capsys.readouterr().err
    with pytest.raises(UserError):
        list_runs(folder / "kan" / "config.yaml")


def test_a_hundred_runs_take_little_time_and_no_torch(folder):
    for number in range(100):
        place = folder / f"{number}"
        place.mkdir()
        for name in ("config.yaml", "metrics.jsonl", "results.json"):
            shutil.copy(folder / "kan" / name, place / name)
    program = (
        "import sys\nfrom kanlm.cli import main\n"
        f"main(['runs', {str(folder)!r}])\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    # Half a second on a free machine.
    assert time.perf_counter() - started < 5
    assert done.stdout.count("finished at step 12") == 102
