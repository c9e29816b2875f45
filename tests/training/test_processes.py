"""Two real processes over gloo compute what one does."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kanlm.checksums import write_checksums
from kanlm.config import Config, from_tree, merge, to_tree, to_yaml
from kanlm.training import run as runs
from kanlm.training.checkpointing.reader import checkpoint_folder
from kanlm.training.resolve import resolve


def launch(config: Config, *command: str) -> None:
    path = Path(config.output_dir).with_suffix(".yaml")
    path.write_text(to_yaml(config))
    done = subprocess.run(
        [sys.executable, "-m", *command, "-m", "kanlm", "pretrain", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=600,
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
        "training": {
            "precision": precision,
            "steps": 20,
            "log_every": 1,
            "evaluate_every": 10,
            "polish_steps": 3,
            "polish_batch_size": 8,
        },
        "penalties": {"l1": 1e-3, "entropy": 1e-3},
    }
    one = resolve(from_tree(merge(to_tree(config), part)))
    two = replace(one, output_dir=str(tmp_path / "two"))
    runs.run(one)
    launch(two, "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    figures = [
        ("train", "loss", 20),
        ("train", "penalty", 20),
        ("train", "gradient_norm", 20),
        ("validation", "nats_per_token", 3),
        ("polish", "loss_before", 1),
        ("polish", "loss_after", 1),
        ("polish", "tokens", 1),
    ]
    for kind, name, count in figures:
        ours = [line[name] for line in lines(one, kind)]
        theirs = [line[name] for line in lines(two, kind)]
        assert len(ours) == count
        assert theirs == pytest.approx(ours, abs=tolerance)
    assert [x["tokens"] for x in lines(one, "train")] == [x["tokens"] for x in lines(two, "train")]


def test_neither_micro_batches_nor_processes_change_how_tokens_are_routed(
    routed: Config, tmp_path: Path
):
    """Drops are decided by sequence, and a z-loss is a mean over tokens."""
    layers = routed.model.feed_forward_by_layer
    layers = [layers[0], {**layers[1], "balance_loss": 0.0}]
    part = {
        "model": {"dropout": 0.0, "feed_forward": layers},
        "training": {"precision": "fp64", "steps": 6, "log_every": 1},
    }
    one = resolve(from_tree(merge(to_tree(routed), part)))
    micro = replace(one.training, micro_batch_size=1)
    split = replace(one, output_dir=str(tmp_path / "micro"), training=micro)
    two = replace(one, output_dir=str(tmp_path / "two"))
    runs.run(one)
    runs.run(split)
    launch(two, "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    expected = lines(one, "train")
    names = ["loss", "auxiliary_loss", *(key for key in expected[0] if key.startswith("model."))]
    assert len(names) == 2 + 4 + 3
    for other in (split, two):
        for ours, theirs in zip(lines(other, "train"), expected, strict=True):
            found = {name: ours[name] for name in names}
            assert found == pytest.approx({name: theirs[name] for name in names}, abs=1e-9)


def test_grids_change_alike_in_two_processes(config: Config, tmp_path: Path):
    """Refined and moved, with the model wrapped anew each time."""
    splines = {"kind": "kan", "base": "silu", "basis": {"kind": "bspline", "degree": 2}}
    part = {
        "model": {"dropout": 0.0, "feed_forward": splines},
        "training": {
            "precision": "fp64",
            "steps": 10,
            "log_every": 1,
            "evaluate_every": 5,
            "grid_schedule": {0: 3, 4: 6},
            "grid_adaptation_steps": [3, 6],
        },
    }
    one = resolve(from_tree(merge(to_tree(config), part)))
    two = replace(one, output_dir=str(tmp_path / "two"))
    runs.run(one)
    launch(two, "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    ours, theirs = ([line["loss"] for line in lines(c, "train")] for c in (one, two))
    assert len(ours) == 10
    assert theirs == pytest.approx(ours, abs=1e-9)
    grids = [lines(c, "grid") for c in (one, two)]
    assert len(grids[0]) == 4
    for mine, other in zip(*grids, strict=True):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            assert other[name] == (pytest.approx(value, abs=1e-9) if "/" in name else value)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "muon_coefficients"), [("kan", True), ("swiglu", False)])
def test_muon_in_two_processes_gives_the_losses_of_one(
    config: Config, tmp_path: Path, kind: str, muon_coefficients: bool
):
    """It narrows its momenta to bfloat16, which turns a difference into a large one or none."""
    part = {
        "model": {"dropout": 0.0, "feed_forward": kind},
        "training": {"precision": "fp64", "log_every": 1},
        "optimizer": {"kind": "muon", "muon_coefficients": muon_coefficients},
    }
    one = resolve(from_tree(merge(to_tree(config), part)))
    two = replace(one, output_dir=str(tmp_path / "two"))
    runs.run(one)
    launch(two, "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    for of, name, count in [("train", "loss", 12), ("validation", "nats_per_token", 3)]:
        ours, theirs = ([line[name] for line in lines(c, of)] for c in (one, two))
        assert len(ours) == count
        assert theirs == pytest.approx(ours, abs=1e-9)


def test_accelerate_launch_runs_a_config(config: Config):
    launch(config, "accelerate.commands.launch", "--cpu", "--num_processes=1")
    assert (Path(config.output_dir) / "results.json").exists()


def run_in_two(
    program: Path, config: Config, folder: Path, *, training: dict[str, Any]
) -> subprocess.CompletedProcess[str]:
    """Pretrain by a program in two processes, in `folder / "two"`."""
    path = folder / "two.yaml"
    part = {"output_dir": str(folder / "two"), "training": training}
    path.write_text(to_yaml(resolve(from_tree(merge(to_tree(config), part)))))
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", str(program)]
    return subprocess.run(
        [sys.executable, "-m", *command, "pretrain", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_wrappers_go_before_the_process_group(config: Config, tmp_path: Path):
    """The last to hold it must not be a wrapper: now and then that never ended."""
    program = tmp_path / "program.py"
    program.write_text(
        """
import gc
import sys
import time

from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from kanlm.cli import main

end_training = Accelerator.end_training


def checked(self):
    print("wrappers left", sum(isinstance(x, DistributedDataParallel) for x in gc.get_objects()))
    end_training(self)


Accelerator.end_training = checked
main(sys.argv[1:])
"""
    )
    done = run_in_two(program, config, tmp_path, training={"steps": 2})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrappers left 0") == 2


def test_one_process_s_trouble_is_everybodys(config: Config, tmp_path: Path):
    """A gradient that is no number in one is left out by both; a crash of one ends the other."""
    program = tmp_path / "program.py"
    crashed = tmp_path / "crashed"
    program.write_text(
        f"""
import math, pathlib
from kanlm import load, train
from kanlm.training.callbacks import Callback


class Disturb(Callback):
    def before_step(self):
        second = self.trainer.accelerator.process_index == 1
        if self.trainer.state.step == 6 and second:
            pathlib.Path({str(crashed)!r}).touch()
            raise ZeroDivisionError
        ill = self.trainer.state.step == 3 and second
        parameter = next(self.trainer.model.parameters())
        self.hook = parameter.register_hook(lambda gradient: gradient * (math.nan if ill else 1))

    def after_step(self):
        self.hook.remove()


train(load({str(tmp_path / "two.yaml")!r}), callbacks=[Disturb()])
"""
    )
    done = run_in_two(program, config, tmp_path, training={"log_every": 1})
    assert time.time() - crashed.stat().st_mtime < 20
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stderr
    two = replace(config, output_dir=str(tmp_path / "two"))
    (unusual,) = lines(two, "unusual")
    assert (unusual["step"], unusual["skipped"]) == (4, True)
    trained = lines(two, "train")
    assert [line["step"] for line in trained] == [1, 2, 3, 5, 6]
    assert all(math.isfinite(line["loss"]) for line in trained)


@pytest.mark.slow
def test_a_full_disk_in_one_process_ends_both_and_costs_no_checkpoint(
    config: Config, tmp_path: Path
):
    """Each process writes its part: the second cannot write the second time."""
    program = tmp_path / "program.py"
    program.write_text(
        """
import errno, os, sys
from kanlm.cli import main
from kanlm.training.checkpointing import tensors

save_file, calls = tensors.save_file, []


def full(held, path):
    calls.append(path)
    if os.environ["RANK"] == "1" and "step-00000004" in str(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    save_file(held, path)


tensors.save_file = full
main(sys.argv[1:])
"""
    )
    training = {"sharding": "full", "checkpoint_every": 2}
    done = run_in_two(program, config, tmp_path, training=training)
    assert done.returncode != 0
    assert done.stderr.count("step-00000004 cannot be written: no space is left on the disk") == 1
    # A traceback would name it; the launcher has one of its own.
    assert "checkpoint.py" not in done.stderr
    kept = sorted(path.name for path in (tmp_path / "two" / "checkpoints").iterdir())
    assert kept == ["latest", "step-00000002"]
    program.write_text("import sys; from kanlm.cli import main; main(sys.argv[1:])")
    assert run_in_two(program, config, tmp_path, training=training).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(("sharding", "victim"), [("none", 1), ("full", 0), ("full", 1)])
def test_a_killed_process_ends_the_other(
    config: Config, tmp_path: Path, sharding: str, victim: int
):
    """In the middle of a step, when the other is about to wait for gradients or parameters."""
    program = tmp_path / "program.py"
    killed = tmp_path / "killed"
    program.write_text(
        f"""
import os, pathlib, signal
from kanlm import load, train
from kanlm.training.callbacks import Callback


class Kill(Callback):
    def loss(self, batch, outputs):
        if self.trainer.state.step == 5 and self.trainer.accelerator.process_index == {victim}:
            pathlib.Path({str(killed)!r}).touch()
            os.kill(os.getpid(), signal.SIGKILL)


train(load({str(tmp_path / "two.yaml")!r}), callbacks=[Kill()])
"""
    )
    training = {"log_every": 1, "sharding": sharding}
    done = run_in_two(program, config, tmp_path, training=training)
    assert time.time() - killed.stat().st_mtime < 20
    assert done.returncode == 1
    assert f"exitcode  : {-signal.SIGKILL}" in done.stderr
    assert not (tmp_path / "two" / "results.json").exists()
    # What the log holds is whole, and the same command goes on.
    two = replace(config, output_dir=str(tmp_path / "two"))
    assert [line["step"] for line in lines(two, "train")] == [1, 2, 3, 4, 5]
    program.write_text("import sys; from kanlm.cli import main; main(sys.argv[1:])")
    again = run_in_two(program, config, tmp_path, training=training)
    assert again.returncode == 0, again.stderr
    assert [line["step"] for line in lines(two, "train")] == list(range(1, 13))


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_is_told_of_once(config: Config, tmp_path: Path):
    program = tmp_path / "program.py"
    program.write_text("import sys; from kanlm.cli import main; main(sys.argv[1:])")
    assert run_in_two(program, config, tmp_path, training={"checkpoint_every": 4}).returncode == 0
    two = tmp_path / "two"
    (two / "results.json").unlink()
    place = checkpoint_folder(two / "checkpoints", 12)
    save_file({"x:exp_avg": torch.ones(3)}, place / "optimizer.safetensors")
    write_checksums(place)
    done = run_in_two(program, config, tmp_path, training={"checkpoint_every": 4})
    assert done.returncode != 0
    assert done.stderr.count("x:exp_avg is of no parameter") == 1
