"""Where the main process cannot write, the others end as well, and one line says why.

Two processes over gloo go through several runs, one after another, in one process group: each
meets something in its folder that it cannot write over.
"""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.multiprocessing.spawn import spawn

from kanlm.atomic_io import write_text
from kanlm.config import Config, from_tree, load, merge, to_tree, to_yaml
from kanlm.errors import UserError
from kanlm.experiments.single import train
from kanlm.training import tracking
from kanlm.training.resolve import resolve
from kanlm.training.run_folder import write_config

#: Seconds from the start of a tiny run that cannot end in results to its end.
PATIENCE = 30.0
#: What cannot be written, and whether the others are still there to be told.
CASES = {
    "cache": True,
    "config.yaml": True,
    "metrics.jsonl": True,
    "metrics.jsonl, later": True,
    "model": True,
    "documents.jsonl": False,
    "results.json": False,
    "report.html": False,
}
SHARED = ("metrics.jsonl, later", "model")


def make(config: Config, folder: Path, case: str, sharding: str) -> Config:
    """Put into a run's folder what it cannot write over."""
    run = folder / f"{case}-{sharding}"
    part = {
        "output_dir": str(run),
        "training": {"steps": 4, "log_every": 1, "sharding": sharding},
    }
    config = resolve(from_tree(merge(to_tree(config), part)))
    run.mkdir()
    if case == "cache":
        run.rmdir()
        (folder / "file").touch()
        return replace(config, data=replace(config.data, cache_dir=str(folder / "file" / "cache")))
    if case == "config.yaml":
        (run / ".config.yaml.draft").mkdir()
        return config
    write_config(run, config)
    if case == "metrics.jsonl":
        (run / case).mkdir()
    elif case == "metrics.jsonl, later":
        # As a disk that is full: it can be opened, and takes nothing.
        (run / "metrics.jsonl").symlink_to("/dev/full")
    elif case == "model":
        (run / case).symlink_to(folder)
    else:
        (run / f".{case}.draft").mkdir()
    return config


def leave_links(path: Path, text: str) -> None:
    """As `write_text`, but for what leads to a full disk."""
    if not path.is_symlink():
        write_text(path, text)


def process(rank: int, port: int, folder: Path, paths: list[Path]) -> None:
    """Be one of two processes, go through the runs, and note how each ended."""
    os.environ.update(environment(rank, port))
    leave_group = Accelerator.end_training
    Accelerator.end_training = lambda self: None  # type: ignore[method-assign]
    tracking.write_text = leave_links
    found = []
    for path in paths:
        started = time.monotonic()
        try:
            train(load(path))
            error = None
        except UserError as caught:
            error = str(caught), caught.reported_by_other_rank
        found.append((path.stem, error, time.monotonic() - started))
        AcceleratorState._reset_state()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    leave_group(Accelerator(cpu=True))


def environment(rank: int, port: int) -> dict[str, str]:
    """As torchrun gives it to the processes that it starts."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_all_processes_end_where_one_cannot_write(config: Config, tmp_path: Path):
    cases = [(case, "none") for case in CASES] + [(case, "full") for case in SHARED]
    paths = []
    for case, sharding in cases:
        settings = make(config, tmp_path, case, sharding)
        paths.append(tmp_path / f"{case}-{sharding}.yaml")
        paths[-1].write_text(to_yaml(settings))
    context = spawn(process, (free_port(), tmp_path, paths), nprocs=2, join=False)
    assert context is not None
    # Whatever hangs does so for half an hour.
    deadline = time.monotonic() + 10 * PATIENCE
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "a process waits for the other"
    finally:
        for each in context.processes:
            assert each is not None
            each.kill()
    main, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert len(main) == len(other) == len(cases)
    for (case, _), ours, theirs in zip(cases, main, other, strict=True):
        name, (line, reported_by_other_rank), seconds = ours
        assert "cannot be written: " in line, name
        assert line.count("\n") == 0
        assert not reported_by_other_rank
        assert case == "cache" or f"{case.partition(',')[0]} cannot" in line
        # Results are written when the others have left.
        assert theirs[1] == ([line, True] if CASES[case] else None), name
        assert max(seconds, theirs[2]) < PATIENCE, name


@pytest.mark.slow
@pytest.mark.parametrize("case", ["metrics.jsonl, later", "model", "results.json"])
def test_processes_end_with_the_code_of_a_mistake(case: str, config: Config, tmp_path: Path):
    """Started as torchrun does, which keeps their codes to itself."""
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(make(config, tmp_path, case, "none")))
    program = tmp_path / "program.py"
    program.write_text(
        f"""
import sys

sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_unwritable import leave_links, tracking

from kanlm.cli import main

tracking.write_text = leave_links
main(sys.argv[1:])
"""
    )
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), "pretrain", str(path)],
            env={**os.environ, **environment(rank, port)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=10 * PATIENCE)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert errors[0].count("kanlm: ") == 1
    assert f"{case.partition(',')[0]} cannot be written: " in errors[0]
    assert "kanlm: " not in errors[1]
    assert "Traceback" not in errors[0] + errors[1]
    assert [process.returncode for process in processes] == [2, 2 if CASES[case] else 0]
