"""What results hold is stated below those who write and who read it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "kanlm"


def rooms(folder: str) -> set[str]:
    """The parts of kanlm that the modules of a room import, but for the room itself."""
    found = set()
    for path in (PACKAGE / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {name.split(".")[1] for name in names if name.startswith("kanlm.")}
    return found - {folder}


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("results", {"config", "errors", "reading"}),
        ("reporting", {"results", "errors", "files", "reading"}),
        ("config", {"errors", "model"}),
    ],
)
def test_a_room_imports_only_what_is_below_it(folder: str, allowed: set[str]) -> None:
    assert rooms(folder) <= allowed


def test_nothing_below_the_experiments_imports_reporting() -> None:
    for folder in ("kan", "model", "data", "evaluation", "training", "results", "config"):
        assert not rooms(folder) & {"reporting", "experiments", "cli"}, folder
