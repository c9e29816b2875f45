"""Records put into an array, and its stages' ends."""

import math

import numpy as np
import pytest

from kanlm.evaluation.losses import losses
from kanlm.results.schema import Record


def record(stage: int, domain: str, step: int, bits: float, **others) -> Record:
    """One of 1,000 bytes with this many bits per byte."""
    place = {"arm": "kan", "seed": 0, "strategy": "plain", "split": "test"} | others
    return Record(
        **place,
        stage=stage,
        domain=domain,
        step=step,
        nats=bits * 1000 * math.log(2),
        bytes=1000,
        tokens=300,
        words=200,
    )


RECORDS = [
    record(0, "prose", 50, 2.0),
    record(0, "code", 50, 3.0),
    record(1, "prose", 0, 2.0),
    record(1, "prose", 10, 2.4),
    record(1, "code", 10, 1.5),
    record(0, "prose", 50, 2.1, seed=3),
    record(0, "prose", 50, 2.2, arm="gelu"),
    record(1, "prose", 10, 2.3, strategy="replay"),
]


def test_each_record_stands_at_its_labels_and_nothing_stands_elsewhere():
    array = losses(RECORDS)
    assert array.labels == {
        "arm": ["kan", "gelu"],
        "seed": [0, 3],
        "strategy": ["plain", "replay"],
        "stage": [0, 1],
        "domain": ["prose", "code"],
        "step": [0, 10, 50],
    }
    assert array.values.shape == (2, 2, 2, 2, 2, 3)
    assert np.isfinite(array.values).sum() == len(RECORDS)
    plain = array.select(arm="kan", seed=0, strategy="plain")
    no = np.nan
    expected = [[[no, no, 2.0], [no, no, 3.0]], [[2.0, 2.4, no], [no, 1.5, no]]]
    np.testing.assert_allclose(plain, expected)
    assert array.select(arm="gelu", seed=0, strategy="plain")[0, 0, 2] == pytest.approx(2.2)


def test_stage_ends_are_the_last_step_at_which_the_stage_was_measured():
    ends = losses(RECORDS).at_stage_ends()
    np.testing.assert_allclose(ends[0, 0, 0], [[2.0, 3.0], [2.4, 1.5]])
    # Nothing at all was measured of the other strategy's first stage, and no code of its second.
    np.testing.assert_allclose(ends[0, 0, 1], [[np.nan, np.nan], [2.3, np.nan]])


def test_a_domain_not_measured_at_the_end_is_not_taken_from_before_it():
    ends = losses([record(1, "prose", 0, 2.0), record(1, "code", 9, 1.0)]).at_stage_ends()
    np.testing.assert_allclose(ends[0, 0, 0, 0], [np.nan, 1.0])


def test_domains_stand_in_the_order_that_is_asked_for():
    array = losses(RECORDS, domains=["law", "code", "prose"])
    assert array.values.shape[4] == 3
    assert np.isnan(array.select(domain="law")).all()
    np.testing.assert_allclose(array.at_stage_ends()[0, 0, 0, :, 1:], [[3.0, 2.0], [1.5, 2.4]])


@pytest.mark.parametrize(
    ("records", "options", "expected"),
    [
        ([*RECORDS, record(0, "prose", 50, 1.0, split="validation")], {}, "several splits"),
        ([*RECORDS, RECORDS[0]], {}, "two records"),
        (RECORDS, {"domains": ["prose"]}, "code"),
    ],
)
def test_records_that_do_not_fit_are_refused(records, options, expected):
    with pytest.raises(ValueError, match=expected):
        losses(records, **options)


@pytest.mark.parametrize(
    ("chosen", "expected"), [({"arms": "kan"}, "axis 'arms'"), ({"arm": "mlp"}, "'kan', 'gelu'")]
)
def test_what_is_not_there_cannot_be_selected(chosen, expected):
    with pytest.raises(ValueError, match=expected):
        losses(RECORDS).select(**chosen)
