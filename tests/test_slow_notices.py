"""What takes over two seconds says what it is, once; what does not says nothing."""

import importlib
import sys
import time
from pathlib import Path

import pytest

from kanlm import slow_notices
from kanlm.slow_notices import announce_if_slow, announce_slow_imports


@pytest.mark.parametrize(("seconds", "said"), [(0.0, []), (0.4, ["building the model …"])])
def test_a_line_comes_once_that_much_time_has_passed(
    monkeypatch: pytest.MonkeyPatch, seconds: float, said: list[str]
):
    monkeypatch.setattr(slow_notices, "PATIENCE", 0.2)
    lines: list[str] = []
    with announce_if_slow("building the model", lines.append):
        time.sleep(seconds)
    time.sleep(0.3)
    assert lines == said


def test_a_mistake_in_the_block_is_not_followed_by_a_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(slow_notices, "PATIENCE", 0.1)
    lines: list[str] = []
    with pytest.raises(ValueError, match="wrong"), announce_if_slow("building", lines.append):
        raise ValueError("wrong")
    time.sleep(0.2)
    assert lines == []


@pytest.mark.parametrize("terminal", [True, False])
def test_libraries_are_named_on_a_terminal_while_they_load(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    terminal: bool,
):
    (tmp_path / "slow_library.py").write_text("import time; time.sleep(0.4)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(slow_notices, "PATIENCE", 0.2)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with announce_slow_imports():
        importlib.import_module("slow_library")
    del sys.modules["slow_library"]
    said = capsys.readouterr().err
    assert said == ("loading torch and transformers …\n" if terminal else "")
    with announce_slow_imports():
        time.sleep(0.4)
    assert capsys.readouterr().err == ""
