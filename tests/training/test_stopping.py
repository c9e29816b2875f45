"""When a process is asked to stop, and what it says for it."""

import os
import signal
import time

import pytest

from kanlm.training.stopping import EXIT_CODES, Stop


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 128 + signal.SIGUSR1)],
)
def test_a_signal_is_noted_and_handlers_come_back(number: int, code: int):
    stop, said = Stop(None), []
    before = signal.getsignal(number)
    with stop.catching_signals(said.append):
        assert stop.exit_code is None
        os.kill(os.getpid(), number)
        assert stop.exit_code == code
        assert code in EXIT_CODES
    assert len(said) == 1
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_stops_at_once():
    with Stop(None).catching_signals(lambda line: None):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_time_limit_is_not_put_off_by_a_clock_that_is_set_back(monkeypatch: pytest.MonkeyPatch):
    stop = Stop(0.05)
    assert stop.exit_code is None
    monkeypatch.setattr(time, "time", lambda: 0.0)
    time.sleep(0.06)
    assert stop.exit_code == 75
