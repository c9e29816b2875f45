"""The published figures are those that were measured."""

import json

import pytest
from benchmarking import BENCHMARKS, publish


def test_tables_are_made_of_the_json():
    kept = json.loads(publish.JSON.read_text())
    assert list(kept) == list(BENCHMARKS)
    assert publish.page(kept) == publish.MARKDOWN.read_text()
    readme = publish.README.read_text()
    assert publish.written(readme, publish.digest(kept)) == readme


def test_figures_tell_where_they_come_from_and_not_whose_machine():
    kept = json.loads(publish.JSON.read_text())
    for results in kept.values():
        made = results["provenance"]
        assert made["commit"]
        assert not made["dirty"]
        assert made["versions"]["torch"]
        assert made["hardware"]["cpu"]
    assert "/" not in "".join(str(r["settings"]) for r in kept.values()).replace("://", "")


def test_a_readme_without_its_marks_is_refused():
    with pytest.raises(ValueError, match="expected"):
        publish.written("# A readme", "a table")
