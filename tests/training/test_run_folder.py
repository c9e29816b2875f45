"""One job in one folder."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kanlm.errors import UserError
from kanlm.training.run_folder import check_free, lock_folder


def test_a_second_job_is_refused_by_the_first_ones_name(tmp_path: Path):
    folder = tmp_path / "deep" / "run"
    check_free(folder)
    assert not folder.exists()
    with lock_folder(folder):
        for attempt in (check_free, lambda folder: lock_folder(folder).__enter__()):
            with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on "):
                attempt(folder)
    check_free(folder)
    with lock_folder(folder):
        pass


def test_a_killed_job_holds_nothing(tmp_path: Path):
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from kanlm.training.run_folder import lock_folder\n"
        "with lock_folder(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)])
    assert done.returncode == -9
    check_free(tmp_path)


def test_a_link_is_not_followed(tmp_path: Path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(victim)
    with pytest.raises(UserError, match="cannot be written"), lock_folder(tmp_path / "run"):
        pass
    assert victim.read_text() == "precious"


def test_a_job_that_begins_nothing_leaves_nothing(tmp_path: Path):
    with lock_folder(tmp_path / "deep" / "run"):
        assert (tmp_path / "deep" / "run" / ".lock").exists()
    assert not (tmp_path / "deep").exists()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").touch()
    with lock_folder(tmp_path / "theirs"):
        pass
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["thesis.txt"]


def test_a_lock_that_its_holder_deletes_is_not_taken_for_the_folder_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Opened before the other job deletes it and locked afterwards, it would lock nothing."""
    first = lock_folder(tmp_path)
    first.__enter__()
    lock = fcntl.flock

    def late(*arguments) -> None:
        monkeypatch.undo()
        first.__exit__(None, None, None)
        lock(*arguments)

    monkeypatch.setattr("fcntl.flock", late)
    with lock_folder(tmp_path), pytest.raises(UserError, match="in use by process"):
        check_free(tmp_path)
