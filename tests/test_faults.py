"""A process dies where it is told to, and nowhere else."""

import os
import signal

import pytest

from kanlm import faults


def end_of_a_process(fault: str) -> int:
    """Its exit code if it passes a point three times; 10 and the visits that it survived."""
    pid = os.fork()
    if not pid:
        os.environ["KANLM_FAULT"] = fault
        faults.fault_point("before-update")
        for visit in range(3):
            faults.fault_point("inside-resume")
            if os.environ.get("KANLM_FAULT") == "leave":
                os._exit(10 + visit)
        os._exit(13)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("inside-resume", -signal.SIGKILL),
        ("inside-resume:3", -signal.SIGKILL),
        ("inside-resume:4", 13),
        ("before-update:2", 13),
    ],
)
def test_the_process_is_killed_at_that_visit(fault: str, code: int):
    assert end_of_a_process(fault) == code


def test_a_misspelt_point_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KANLM_FAULT", "inside-resum")
    with pytest.raises(RuntimeError, match="expected one of"):
        faults.fault_point("inside-resume")
