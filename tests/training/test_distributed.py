"""Processes wait for the main one as long as it takes, and no longer than it lives."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = """
import os, signal, sys, time
from datetime import timedelta
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from kanlm.errors import UserError
from kanlm.training.distributed import gather_results, run_on_main, tear_down

limit = InitProcessGroupKwargs(timeout=timedelta(seconds=2))
accelerator = Accelerator(cpu=True, kwargs_handlers=[limit])
rank = accelerator.process_index
run_on_main(accelerator, lambda: None)


def act():
    print("acting", flush=True)
    {act}


try:
    print(rank, run_on_main(accelerator, act), flush=True)
    print(rank, gather_results(accelerator, lambda: time.sleep(5 * rank) or rank), flush=True)
    tear_down(accelerator)
except UserError as error:
    print(rank, "told" if not error.reported_by_other_rank else "silent", error, flush=True)
    sys.exit(2)
"""


def start(tmp_path: Path, act: str) -> list[subprocess.Popen]:
    """Two processes that no launcher watches."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("{act}", act))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return [
        subprocess.Popen(
            [sys.executable, str(program)],
            env={**os.environ, **settings, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]


def test_a_long_preparation_outlasts_the_group_s_timeout(tmp_path: Path):
    processes = start(tmp_path, "time.sleep(5); return 'prepared'")
    found = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], found
    assert found[1][0].splitlines() == ["1 prepared", "1 [0, 1]"]


def test_who_waits_for_a_process_that_was_killed_ends_soon(tmp_path: Path):
    main, other = start(tmp_path, "time.sleep(60)")
    assert main.stdout is not None
    assert main.stdout.readline() == "acting\n"
    died = time.monotonic()
    main.kill()
    told, _ = other.communicate(timeout=30)
    assert time.monotonic() - died < 15
    assert other.returncode == 2
    assert told.startswith("1 told another process of this run has ended")
    main.communicate(timeout=30)


def test_ctrl_c_ends_both(tmp_path: Path):
    """The terminal sends it to all; waiting in C++, the others would not hear of it."""
    processes = start(tmp_path, "time.sleep(60)")
    assert processes[0].stdout is not None
    assert processes[0].stdout.readline() == "acting\n"
    for process in reversed(processes):
        process.send_signal(signal.SIGINT)
    for process in processes:
        assert "KeyboardInterrupt" in process.communicate(timeout=20)[1]
