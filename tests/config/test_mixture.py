"""Weights of a mixture as numbers and as schedules, and what is none."""

from typing import Any

import pytest

from kanlm.config import DataSettings, load, mixture_stages, to_yaml
from kanlm.config.schema.mixture import weight_schedule


@pytest.mark.parametrize(
    ("weight", "schedule"),
    [
        (2, {0: 2.0}),
        (0.5, {0: 0.5}),
        ({0: 1, 10: 0}, {0: 1.0, 10: 0.0}),
        ({"100": 1, "20": 3.5, "0": 0}, {0: 0.0, 20: 3.5, 100: 1.0}),
    ],
)
def test_a_weight_is_a_number_or_a_schedule(weight: Any, schedule: dict[int, float]):
    found = weight_schedule(weight)
    assert list(found.items()) == list(schedule.items())
    assert all(isinstance(value, float) for value in found.values())


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (0, "a positive number"),
        (-1.0, "a positive number"),
        (True, "a positive number"),
        ("1", "a positive number"),
        (None, "a positive number"),
        (float("nan"), "a positive number"),
        ({}, "an entry for step 0"),
        ({3: 1.0}, "an entry for step 0"),
        ({0: 1.0, -3: 2.0}, "whole numbers of updates"),
        ({0: 1.0, "half": 2.0}, "whole numbers of updates"),
        ({0: 1.0, 2.5: 2.0}, "whole numbers of updates"),
        ({0: 0, 10: 0}, "not all of them 0"),
        ({0: 1.0, 10: -1.0}, "0 or more"),
        ({0: 1.0, 10: None}, "0 or more"),
    ],
)
def test_anything_else_is_refused(weight: Any, said: str):
    with pytest.raises(ValueError, match=f"expected .*{said}"):
        weight_schedule(weight)


def test_stages_begin_where_any_weight_changes():
    stages = mixture_stages([{0: 1.0, 20: 0.5}, {0: 2.0}, {0: 0.0, 10: 3.0, 20: 4.0}])
    assert stages == {0: [1.0, 2.0, 0.0], 10: [1.0, 2.0, 3.0], 20: [0.5, 2.0, 4.0]}


def test_there_is_always_something_to_train_on():
    sources: list[dict[str, Any]] = [
        {"kind": "stdlib-prose", "weight": {0: 1, 10: 0}},
        {"kind": "stdlib-code", "weight": {0: 0, 20: 1}},
    ]
    with pytest.raises(ValueError, match="every weight is 0 from update 10 on"):
        DataSettings(sources=sources)


def test_a_schedule_is_written_and_read_again(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "data:\n  sources:\n  - {kind: stdlib-prose, weight: {0: 1.0, 500: 0.25}}\n"
        "  - {kind: stdlib-code, weight: {0: 0, 20: 1}}\n"
    )
    config = load(tmp_path / "a.yaml")
    assert config.data.weights == [{0: 1.0, 500: 0.25}, {0: 0.0, 20: 1.0}]
    (tmp_path / "b.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "b.yaml") == config
