"""The published figures are those that were measured."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def benchmarks() -> ModuleType:
    """scripts/benchmarks.py."""
    path = ROOT / "scripts" / "benchmarks.py"
    spec = importlib.util.spec_from_file_location("benchmarks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_made_of_the_json(benchmarks: ModuleType):
    kept = json.loads(benchmarks.JSON.read_text())
    assert list(kept) == list(benchmarks.NAMES)
    assert benchmarks.page(kept) == benchmarks.MARKDOWN.read_text()
    readme = benchmarks.README.read_text()
    assert benchmarks.written(readme, benchmarks.digest(kept)) == readme


def test_figures_tell_where_they_come_from_and_not_whose_machine(benchmarks: ModuleType):
    kept = json.loads(benchmarks.JSON.read_text())
    for results in kept.values():
        made = results["provenance"]
        assert made["commit"]
        assert not made["dirty"]
        assert made["versions"]["torch"]
        assert made["hardware"]["cpu"]
    assert "/" not in "".join(str(r["settings"]) for r in kept.values()).replace("://", "")


def test_a_readme_without_its_marks_is_refused(benchmarks: ModuleType):
    with pytest.raises(ValueError, match="expected"):
        benchmarks.written("# A readme", "a table")
