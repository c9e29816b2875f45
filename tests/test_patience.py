"""What takes over two seconds says what it is, once; what does not says nothing."""

import importlib
import sys
import time
from pathlib import Path

import pytest

from kanlm import patience
from kanlm.patience import saying, saying_imports


@pytest.mark.parametrize(("seconds", "said"), [(0.0, []), (0.4, ["building the model …"])])
def test_a_line_comes_once_that_much_time_has_passed(
    monkeypatch: pytest.MonkeyPatch, seconds: float, said: list[str]
):
    monkeypatch.setattr(patience, "PATIENCE", 0.2)
    lines: list[str] = []
    with saying("building the model", lines.append):
        time.sleep(seconds)
    time.sleep(0.3)
    assert lines == said


def test_a_mistake_in_the_block_is_not_followed_by_a_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patience, "PATIENCE", 0.1)
    lines: list[str] = []
    with pytest.raises(ValueError, match="wrong"), saying("building", lines.append):
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
    monkeypatch.setattr(patience, "PATIENCE", 0.2)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with saying_imports():
        importlib.import_module("slow_library")
    del sys.modules["slow_library"]
    said = capsys.readouterr().err
    assert said == ("loading torch and transformers …\n" if terminal else "")
    with saying_imports():
        time.sleep(0.4)
    assert capsys.readouterr().err == ""
