"""The sentences must follow the evidence: who leads, and whether anything separates them."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kanlm.reporting.summary import findings


@pytest.fixture
def results(study_folder: Path) -> dict[str, Any]:
    return json.loads((study_folder / "results.json").read_text())


def base_pair(results: dict[str, Any], arm: str, other: str) -> dict[str, Any]:
    return next(
        pair
        for pair in results["comparisons"]
        if (pair["arm"], pair["other"], pair["stage"], pair["domain"]) == (arm, other, 0, "prose")
    )


def test_the_leader_is_named_with_the_evidence(results: dict[str, Any]) -> None:
    pair = base_pair(results, "kan", "swiglu")
    low, high = pair["difference_interval"]
    sentence = findings(results)[0]
    assert sentence.startswith("On prose, swiglu is ahead of kan: 2.0")
    assert f"difference {pair['difference']:.3f}" in sentence
    assert f"{low:.3f}–{high:.3f}" in sentence
    assert "swiglu better in 2 of 2 seeds" in sentence


def test_turning_a_pair_around_changes_no_sentence(results: dict[str, Any]) -> None:
    turned = copy.deepcopy(results)
    pair = base_pair(turned, "kan", "swiglu")
    low, high = pair["difference_interval"]
    pair.update(
        arm="swiglu",
        other="kan",
        difference=-pair["difference"],
        difference_by_seed=[-value for value in pair["difference_by_seed"]],
        difference_interval=[-high, -low],
    )
    assert findings(turned) == findings(results)


@pytest.mark.parametrize(
    "change",
    [
        {"difference_interval": [-0.01, 0.11]},
        {"difference_by_seed": [-0.01, 0.11]},
        {"difference_interval": None},
    ],
)
def test_no_leader_without_both_documents_and_seeds(
    results: dict[str, Any], change: dict[str, Any]
) -> None:
    base_pair(results, "kan", "swiglu").update(change)
    sentence = findings(results)[0]
    assert "swiglu and kan are not told apart" in sentence
    assert "ahead" not in sentence


def test_one_seed_says_that_seed_noise_is_unknown(
    tmp_path: Path, study_maker: Callable[..., Path]
) -> None:
    folder = study_maker(tmp_path / "study", arms=("kan", "swiglu"), seeds=(3,))
    results = json.loads((folder / "results.json").read_text())
    prediction, forgetting = findings(results)
    assert "swiglu is ahead of kan" in prediction
    assert "seed noise is not known" in prediction
    assert "seed noise is not known" in forgetting
    base_pair(results, "kan", "swiglu")["difference_interval"] = [-0.1, 0.2]
    assert "swiglu is level with kan" in findings(results)[0]


def test_forgetting_stands_beside_the_gain(results: dict[str, Any]) -> None:
    arms = results["arms"]
    sentence = findings(results)[1]
    assert sentence.startswith("After code, kan forgot least: +0.3")
    for name in ("kan", "gelu"):
        assert f"+{arms[name]['forgetting']['prose']:.3f}" in sentence
        assert f"{arms[name]['learning_gain']['code']:.3f}" in sentence
    assert "the same order in each of 2 seeds" in sentence


def test_forgetting_less_by_learning_less_is_said(results: dict[str, Any]) -> None:
    assert "learned less" not in findings(results)[1]
    results["arms"]["kan"]["learning_gain"]["code"] = 1.0
    assert "It also learned less than gelu" in findings(results)[1]


def test_what_is_forgotten_alike_to_the_last_digit_shown_has_no_winner(
    results: dict[str, Any],
) -> None:
    for name in ("kan", "swiglu", "gelu"):
        results["arms"][name]["backward_transfer"] = -0.3
    results["arms"]["swiglu"]["backward_transfer"] = -0.3001
    assert findings(results)[1].startswith("After code, kan forgot no less than gelu: +0.300")


def test_seeds_that_disagree_settle_nothing(results: dict[str, Any]) -> None:
    results["arms"]["kan"]["forgetting_by_seed"][1]["prose"] = 9.0
    assert "seeds disagree (1 of 2), so the order is not settled" in findings(results)[1]


def test_a_single_arm_is_reported_without_a_contest(
    tmp_path: Path, study_maker: Callable[..., Path]
) -> None:
    folder = study_maker(tmp_path / "study", arms=("kan",))
    prediction, forgetting = findings(json.loads((folder / "results.json").read_text()))
    assert prediction.startswith("kan predicts prose at 2.1")
    assert forgetting.startswith("After code, kan lost +0.3")


def test_pretraining_alone_says_nothing_of_forgetting(
    tmp_path: Path, study_maker: Callable[..., Path]
) -> None:
    folder = study_maker(tmp_path / "study", stages=1)
    assert len(findings(json.loads((folder / "results.json").read_text()))) == 1


def test_arms_that_share_no_seed_are_not_paired(results: dict[str, Any]) -> None:
    results["comparisons"] = []
    results["arms"]["kan"]["seeds"] = [7, 8]
    prediction, forgetting = findings(results)
    assert prediction.startswith("On prose, swiglu and kan share no seed: 2.0")
    assert "; they share no seed" in forgetting


def test_what_was_not_measured_is_not_compared(results: dict[str, Any]) -> None:
    for arm in results["arms"].values():
        arm["learning_gain"]["code"] = None
        arm["forgetting_by_seed"][0]["prose"] = None
    sentence = findings(results)[1]
    assert "having gained – against –" in sentence
    assert "learned less" not in sentence
    for arm in results["arms"].values():
        arm["bits_per_byte"][0][0] = None
    assert findings(results)[0] == "No loss on prose was a finite number."


@pytest.mark.parametrize(
    ("bigram", "xz", "said"),
    [
        (3.0, 2.9, None),
        (2.1, 2.9, "kan and gelu are behind a bigram, which knows pairs of tokens alone (2.100)."),
        (2.0, 2.9, "All arms are behind a bigram, which knows pairs of tokens alone (2.000)."),
        (3.0, 2.12, "gelu is behind xz, which has the training text before it (2.120)."),
        (None, None, None),
    ],
)
def test_the_lead_says_who_is_behind_a_reference(
    bigram: float | None, xz: float | None, said: str | None, results: dict[str, Any]
) -> None:
    known = {"bigram": bigram, "xz": xz}
    results["references"]["prose"] = {k: v for k, v in known.items() if v is not None}
    for name, loss in {"kan": 2.11, "swiglu": 2.07, "gelu": 2.16}.items():
        results["arms"][name]["bits_per_byte"][0][0] = loss
    lead = findings(results)[0]
    assert said is None or lead.endswith(said)
    assert ("behind" in lead) == (said is not None)


def test_choices_at_the_edge_of_their_grid_are_said_last(
    results: dict[str, Any], sweep_maker: Callable[..., dict[str, Any]]
) -> None:
    losses = {0.001: 2.3, 0.003: 2.2, 0.01: 2.1}
    for name in ("kan", "swiglu"):
        results["arms"][name]["sweep"] = sweep_maker(losses)
    results["arms"]["gelu"]["sweep"] = sweep_maker({**losses, 0.001: 2.0})
    *_, largest, smallest = findings(results)
    assert "the largest optimizer.learning_rate of its grid was best for kan (0.01) and swiglu" in (
        largest
    )
    assert "the smallest optimizer.learning_rate of its grid was best for gelu (0.001)" in smallest
    results["arms"]["kan"]["sweep"] = sweep_maker({**losses, 0.03: None})
    assert "kan" not in findings(results)[-2]
