"""The launchers' decisions, with programs of the same names that only say how they are called."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder of programs, first on the path."""
    place = tmp_path / "programs"
    place.mkdir()
    write(place / "python", 'echo "$@"')
    return place


def write(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def call(script: str, programs: Path, *arguments: str, **variables: str):
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    path = f"{programs}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *arguments],
        env={**environment, "PATH": path, "PYTHON": str(programs / "python"), **variables},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_every_config(path: Path):
    """It refuses unknown keys itself, but not those within fsdp_config."""
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    options = {action.dest for action in launch_command_parser()._actions}
    assert set(config.fsdp_config or {}) <= options
    # Of these kanlm's own settings decide.
    assert config.mixed_precision == "no"


def test_the_configs_are_the_four_that_the_launcher_and_the_readme_name():
    names = [path.stem for path in CONFIGS]
    assert names == ["fsdp2", "one-gpu", "one-node", "several-nodes"]
    fsdp = load_config_from_file(str(ROOT / "configs" / "accelerate" / "fsdp2.yaml"))
    assert isinstance(fsdp, ClusterConfig)
    assert fsdp.fsdp_config is not None
    assert fsdp.fsdp_config["fsdp_version"] == 2


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"GPUS": "4"}, ["one-node.yaml", "--num_processes 4"]),
        ({"GPUS": "1"}, ["one-gpu.yaml", "--num_processes 1"]),
        ({"CUDA_VISIBLE_DEVICES": "0,3"}, ["one-node.yaml", "--num_processes 2"]),
        ({"GPUS": "0"}, []),
        ({"GPUS": "0", "PROCESSES": "2"}, ["torch.distributed.run", "--nproc_per_node 2"]),
        ({"GPUS": "2", "ACCELERATE_CONFIG": "mine.yaml"}, ["--config_file mine.yaml"]),
    ],
)
def test_launch_counts_gpus_and_passes_the_rest(programs, variables, expected):
    done = call("launch", programs, "pretrain", "a b.yaml", "x=1", **variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("-m kanlm pretrain a b.yaml x=1")
    for part in expected:
        assert part in done.stdout


#: Two tasks with their numbers, each in a process group of its own; the largest exit code.
SRUN = """
while [[ $1 == -* ]]; do echo "srun $1"; shift; done
worst=0
for i in 0 1; do
    SLURM_PROCID=$i SLURM_LOCALID=$i setsid "$@" &
    tasks[i]=$!
done
[ -z "$SEND" ] || { sleep 0.5; for task in "${tasks[@]}"; do kill "-$SEND" "-$task"; done; }
for task in "${tasks[@]}"; do
    wait "$task"; code=$?
    [ $code -gt $worst ] && worst=$code
done
exit $worst
"""


def submit(programs: Path, python: str, scontrol: str = "exit 0", **variables: str):
    """Run slurm.sbatch as SLURM would for two tasks of three CPUs."""
    write(programs / "python", python)
    write(programs / "srun", SRUN)
    write(programs / "scontrol", f'[ "$1" = show ] && echo node-a && exit; echo "$@"; {scontrol}')
    return call(
        "slurm.sbatch",
        programs,
        "pretrain",
        "x.yaml",
        SLURM_JOB_ID="77",
        SLURM_JOB_NODELIST="node-[a-b]",
        SLURM_NTASKS="2",
        SLURM_NNODES="1",
        SLURM_CPUS_PER_TASK="3",
        **variables,
    )


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ((0, 0), 0),
        ((138, 138), None),
        ((75, 75), None),
        # The main process may still be writing what the others have not to do with.
        ((138, 0), None),
        ((2, 2), 2),
        ((1, 138), 1),
        ((138, 1), 1),
        ((75, 2), 2),
        ((137, 138), 137),
        ((143, 143), 143),
    ],
)
def test_a_slurm_job_goes_back_into_the_queue_when_it_has_saved(programs, codes, expected):
    tell = 'echo "$RANK/$WORLD_SIZE/$LOCAL_RANK $MASTER_ADDR $@"'
    done = submit(programs, f"{tell}; codes=({codes[0]} {codes[1]}); exit ${{codes[RANK]}}")
    assert "0/2/0 node-a -m kanlm pretrain x.yaml" in done.stdout
    assert "1/2/1 node-a -m kanlm pretrain x.yaml" in done.stdout
    assert "srun --cpus-per-task=3\n" in done.stdout
    assert ("requeue 77" in done.stdout) == (expected is None)
    assert done.returncode == (expected or 0)


def test_a_slurm_job_that_is_not_taken_back_has_failed(programs):
    done = submit(programs, "exit 138", 'echo "operation is disabled" >&2; exit 1')
    assert done.returncode == 75
    assert "submit it again" in done.stderr


def test_slurm_s_signal_reaches_the_processes_and_their_codes_come_back(programs):
    waiting = "trap 'exit 138' USR1; for i in $(seq 100); do sleep 0.1; done"
    done = submit(programs, waiting, SEND="USR1")
    assert done.returncode == 0, done.stderr
    assert "requeue 77" in done.stdout


def test_what_is_said_of_the_slurm_script_is_what_it_does():
    """It starts the processes itself, without this configuration or its launcher."""
    said = (ROOT / "configs" / "accelerate" / "several-nodes.yaml").read_text()
    script = (ROOT / "scripts" / "slurm.sbatch").read_text()
    assert "needs neither this file nor Accelerate's launcher" in said
    assert "accelerate" not in script


def test_the_lowest_versions_are_those_of_the_dependencies():
    command = [sys.executable, str(ROOT / "scripts" / "oldest_versions.py")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert len(printed) == len(stated)
    for pinned, dependency in zip(map(Requirement, printed), map(Requirement, stated), strict=True):
        (version,) = pinned.specifier
        assert pinned.name == dependency.name
        assert version.operator == "=="
        assert dependency.specifier.contains(version.version)
        assert f">={version.version}" in str(dependency.specifier)


def test_torch_has_an_upper_bound():
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (torch,) = [Requirement(each) for each in stated if Requirement(each).name == "torch"]
    assert any(each.operator == "<" for each in torch.specifier)


@pytest.mark.parametrize(
    "name", ["bench", "benchmarks", "chaos", "controls", "fuzz", "golden", "gpu_kernels"]
)
def test_a_script_runs_the_program_of_its_name(name: str):
    path = ROOT / "scripts" / name
    last = path.read_text().splitlines()[-1]
    found = re.search(r'exec \.venv/bin/python (?:-m )?(\S+) "\$@"$', last)
    assert found is not None
    assert os.access(path, os.X_OK)
    assert (ROOT / found[1]).exists() or importlib.util.find_spec(found[1]) is not None
