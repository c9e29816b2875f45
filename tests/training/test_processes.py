"""Two real processes over gloo compute what one does."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kanlm.config import Config, from_tree, merge, to_tree, to_yaml
from kanlm.training import run as runs
from kanlm.training.resolve import resolve


def launch(config: Config, *command: str) -> None:
    path = Path(config.output_dir).with_suffix(".yaml")
    path.write_text(to_yaml(config))
    done = subprocess.run(
        [sys.executable, "-m", *command, "-m", "kanlm", "pretrain", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def lines(config: Config, kind: str) -> list[dict]:
    text = (Path(config.output_dir) / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-9), ("fp32", 1e-5)])
def test_two_processes_with_half_the_batch_each_give_the_losses_of_one(
    config: Config, tmp_path: Path, precision: str, tolerance: float
):
    part = {
        "model": {"dropout": 0.0},
        "training": {"precision": precision, "steps": 20, "log_every": 1, "evaluate_every": 10},
    }
    one = resolve(from_tree(merge(to_tree(config), part)))
    two = replace(one, output_dir=str(tmp_path / "two"))
    runs.run(one)
    launch(two, "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    for kind, name in (("train", "loss"), ("validation", "nats_per_token")):
        ours = [line[name] for line in lines(one, kind)]
        theirs = [line[name] for line in lines(two, kind)]
        assert len(ours) == (20 if kind == "train" else 2)
        assert theirs == pytest.approx(ours, abs=tolerance)
    assert [x["tokens"] for x in lines(one, "train")] == [x["tokens"] for x in lines(two, "train")]


def test_accelerate_launch_runs_a_config(config: Config):
    launch(config, "accelerate.commands.launch", "--cpu", "--num_processes=1")
    assert (Path(config.output_dir) / "results.json").exists()
