"""Derived figures against numbers worked out by hand from round records."""

import json
from dataclasses import asdict, replace
from math import exp, log
from pathlib import Path

import numpy as np
import pytest

from kanlm.errors import UserError
from kanlm.evaluation.perplexity import Evaluation
from kanlm.evaluation.statistics import bootstrap_interval
from kanlm.experiments.derive import derive
from kanlm.experiments.result_files import read_documents, write_results
from kanlm.results.read import notes_of, records_of
from kanlm.results.schema import ARM_FACTS, SCHEMA_VERSION, EvaluationKey, Note, Record

DOMAINS = ["prose", "code"]
#: Bits per byte by (arm, seed): [stage][domain].
BITS = {
    ("kan", 0): [[2.0, 3.0], [2.2, 1.0]],
    ("kan", 1): [[2.2, 3.2], [2.6, 1.2]],
    ("swiglu", 0): [[2.1, 3.0], [2.5, 1.1]],
    ("swiglu", 1): [[2.1, 3.4], [2.7, 1.1]],
}
#: 4 documents of 100 bytes, 25 words and 50 tokens each.
DOCUMENTS = 4


def key_of(arm: str, seed: int, stage: int, domain: str) -> EvaluationKey:
    return EvaluationKey(
        arm=arm,
        seed=seed,
        strategy="fine-tuning",
        stage=stage,
        domain=domain,
        step=100,
        split="test",
    )


def make_evaluations() -> dict[EvaluationKey, Evaluation]:
    evaluations = {}
    for (arm, seed), matrix in BITS.items():
        for stage, row in enumerate(matrix):
            for domain, bits in zip(DOMAINS, row, strict=True):
                share = np.array([0.7, 0.9, 1.1, 1.3])
                evaluations[key_of(arm, seed, stage, domain)] = Evaluation(
                    nats=bits * log(2) * 100 * share,
                    tokens=np.full(DOCUMENTS, 50),
                    words=np.full(DOCUMENTS, 25),
                    bytes=np.full(DOCUMENTS, 100),
                )
    return evaluations


def make_records(evaluations: dict[EvaluationKey, Evaluation]) -> list[Record]:
    return [Record.of(key, evaluation.sums()) for key, evaluation in evaluations.items()]


def facts(label: str) -> dict:
    return {**dict.fromkeys(ARM_FACTS), "feed_forward": label, "parameters": 1000}


ARMS = {"kan": facts("kan/bspline1-g6-silu"), "swiglu": facts("swiglu")}


def derived(records=None, **changes):
    evaluations = make_evaluations()
    settings = {
        "domains": DOMAINS,
        "documents": evaluations,
        "references": {"prose": {"bigram": 3.0, "xz": 2.5}},
        "provenance": {"commit": "abc"},
        "resamples": 200,
    }
    records = make_records(evaluations) if records is None else records
    return derive(records, changes.pop("arms", ARMS), **{**settings, **changes})


def test_matrices_are_means_over_seeds() -> None:
    kan = derived()["arms"]["kan"]
    assert kan["seeds"] == [0, 1]
    np.testing.assert_allclose(kan["bits_per_byte"], [[2.1, 3.1], [2.4, 1.1]])
    np.testing.assert_allclose(kan["bits_per_byte_by_seed"], [BITS["kan", 0], BITS["kan", 1]])


def test_perplexity_of_several_seeds_is_exp_of_the_mean_loss() -> None:
    kan = derived()["arms"]["kan"]
    # 2.1 bits a byte · 2 bytes a token, 4 bytes a word.
    assert kan["perplexity"][0][0] == pytest.approx(2 ** (2.1 * 2))
    assert kan["word_perplexity"][0][0] == pytest.approx(2 ** (2.1 * 4))
    assert kan["perplexity_by_seed"][1][0][0] == pytest.approx(exp(2.2 * 2 * log(2)))


def test_forgetting_gain_and_transfer() -> None:
    arms = derived()["arms"]
    # prose: 2.2 − 2.0 and 2.6 − 2.2; 2.5 − 2.1 and 2.7 − 2.1.
    assert arms["kan"]["forgetting"] == pytest.approx({"prose": 0.3})
    assert arms["kan"]["forgetting_by_seed"] == [
        pytest.approx({"prose": 0.2}),
        pytest.approx({"prose": 0.4}),
    ]
    assert arms["kan"]["forgetting_from_best"] == pytest.approx({"prose": 0.3})
    assert arms["kan"]["backward_transfer"] == pytest.approx(-0.3)
    assert arms["swiglu"]["backward_transfer"] == pytest.approx(-0.5)
    # code: 3.0 − 1.0 and 3.2 − 1.2.
    assert arms["kan"]["learning_gain"] == pytest.approx({"code": 2.0})
    assert arms["kan"]["learning_gain_by_seed"] == [pytest.approx({"code": 2.0})] * 2
    assert arms["kan"]["forward_transfer"] == pytest.approx({"code": 0.0})
    # (2.2 + 1.0 + 2.6 + 1.2) / 4
    assert arms["kan"]["average_final_loss"] == pytest.approx(1.75)


def test_intervals_are_those_of_the_documents() -> None:
    kan = derived()["arms"]["kan"]
    evaluations = make_evaluations()
    nats = [evaluations[key_of("kan", seed, 1, "code")].nats for seed in (0, 1)]
    interval = bootstrap_interval(
        np.mean(nats, axis=0), np.full(DOCUMENTS, 100), resamples=200, seed=0
    )
    assert kan["bits_per_byte_interval"][1][1] == [interval.low, interval.high]
    low, high = kan["bits_per_byte_interval"][0][0]
    assert 0.7 * 2.1 <= low < 2.1 < high <= 1.3 * 2.1


def test_arms_are_compared_by_seed_and_document() -> None:
    compared = derived()["comparisons"]
    assert len(compared) == 4
    final = next(c for c in compared if c["stage"] == 1 and c["domain"] == "prose")
    assert (final["arm"], final["other"]) == ("kan", "swiglu")
    assert final["difference_by_seed"] == pytest.approx([-0.3, -0.1])
    assert final["difference"] == pytest.approx(-0.2)
    # Every document differs by its share of 0.2, from 0.7 to 1.3 of it.
    low, high = final["difference_interval"]
    assert -0.26 <= low < -0.2 < high <= -0.14


def test_only_shared_seeds_are_compared() -> None:
    records = [r for r in make_records(make_evaluations()) if (r.arm, r.seed) != ("swiglu", 0)]
    final = derived(records)["comparisons"][0]
    assert final["seeds"] == [1]
    assert final["difference"] == pytest.approx(0.1)


def test_what_was_not_measured_is_null() -> None:
    evaluations = make_evaluations()
    left_out = key_of("kan", 0, 0, "code")
    records = make_records({k: v for k, v in evaluations.items() if k != left_out})
    del evaluations[key_of("kan", 1, 1, "prose")]
    results = derived(records, documents=evaluations)
    kan = results["arms"]["kan"]
    assert kan["bits_per_byte"][0][1] is None
    assert kan["bits_per_byte_by_seed"][1][0][1] == pytest.approx(3.2)
    assert kan["learning_gain"] == {"code": None}
    assert kan["bits_per_byte_interval"][1][0] is None
    assert not [c for c in results["comparisons"] if (c["stage"], c["domain"]) == (0, "code")]


def test_one_document_has_no_interval() -> None:
    single = {
        place: Evaluation(
            nats=e.nats[:1], tokens=e.tokens[:1], words=0 * e.words[:1], bytes=e.bytes[:1]
        )
        for place, e in make_evaluations().items()
    }
    results = derived(make_records(single), documents=single)
    assert results["arms"]["kan"]["bits_per_byte_interval"] == [[None, None], [None, None]]
    assert results["comparisons"][0]["difference_interval"] is None
    assert results["arms"]["kan"]["word_perplexity"][0][0] is None


def test_pretraining_alone_has_no_forgetting() -> None:
    records = [r for r in make_records(make_evaluations()) if r.stage == 0]
    kan = derived(records)["arms"]["kan"]
    assert kan["forgetting"] == kan["learning_gain"] == {}
    assert kan["backward_transfer"] is None
    assert kan["average_final_loss"] == pytest.approx(2.1)


def test_the_last_step_of_a_place_counts() -> None:
    records = make_records(make_evaluations())
    early = replace(records[0], step=50, nats=9 * records[0].nats)
    assert derived([*records, early])["arms"] == derived(records)["arms"]


def test_facts_of_arms_and_everything_else_are_kept() -> None:
    results = derived()
    assert results["schema_version"] == SCHEMA_VERSION
    assert results["domains"] == DOMAINS
    assert set(ARM_FACTS) <= set(results["arms"]["kan"])
    assert results["references"]["prose"]["bigram"] == 3.0
    assert results["provenance"] == {"commit": "abc"}
    assert len(results["records"]) == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "validation"}, "several splits"),
        ({"strategy": "replay"}, "one strategy"),
        ({"domain": "law"}, "law"),
        ({"arm": "gelu"}, "gelu"),
    ],
)
def test_records_that_do_not_belong_together_are_refused(change: dict, message: str) -> None:
    records = make_records(make_evaluations())
    with pytest.raises(ValueError, match=message):
        derived([*records, replace(records[0], **change)])


def test_notes_are_kept_once_and_of_what_is_there() -> None:
    note = Note(arm="kan", domain="code", note="trained on this text")
    results = derived(notes=[note, note, Note(arm=None, domain=None, note="of all")])
    assert notes_of(results) == [note, Note(arm=None, domain=None, note="of all")]
    for strange in (Note(arm="mlp", domain=None, note="?"), Note(arm=None, domain="law", note="?")):
        with pytest.raises(ValueError, match="not announced"):
            derived(notes=[strange])


def test_arms_must_state_their_facts_and_read_the_same_text() -> None:
    less = {key: value for key, value in ARMS["kan"].items() if key != "parameters"}
    with pytest.raises(ValueError, match="lacks parameters"):
        derived(arms={**ARMS, "kan": less})
    evaluations = make_evaluations()
    evaluations[key_of("kan", 0, 0, "prose")].bytes[0] = 99
    with pytest.raises(ValueError, match="different text of prose"):
        derived(make_records(evaluations), documents=evaluations)


def test_files_round_trip(tmp_path: Path) -> None:
    evaluations = make_evaluations()
    results = derived()
    write_results(tmp_path, results, evaluations)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert records_of(results) == make_records(evaluations)
    again = read_documents(tmp_path / "documents.jsonl")
    assert list(again) == list(evaluations)
    for place, evaluation in evaluations.items():
        np.testing.assert_array_equal(again[place].nats, evaluation.nats)
        assert again[place].bytes.dtype == np.int64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents.jsonl", "results.json"]


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line[: len(line) // 2],
        lambda line: b"[1]",
        lambda line: b"\xff",
        lambda line: line.replace(b'"bytes"', b'"byte"'),
        lambda line: line.replace(b"[50, 50", b"[50, 50.5"),
        lambda line: line.replace(b"[50, 50", b"[-50, 50"),
        lambda line: line.replace(b"[50, 50", b"[50"),
        lambda line: line.replace(b'"nats": [', b'"nats": ["1.5", '),
        lambda line: line.replace(b'"nats": [', b'"nats": [NaN, '),
        lambda line: line.replace(b'"arm": "kan"', b'"arm": []'),
    ],
)
def test_a_line_of_documents_that_was_not_written_here_is_named(change, tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    write_results(tmp_path, derived(), make_evaluations())
    first, second, *rest = path.read_bytes().splitlines(keepends=True)
    damaged = change(second)
    assert damaged != second
    path.write_bytes(first + damaged.rstrip(b"\n") + b"\n" + b"".join(rest))
    with pytest.raises(UserError, match=r"documents\.jsonl, line 2: expected sums by document"):
        read_documents(path)


def test_a_loss_that_is_no_number_gives_no_results(tmp_path: Path) -> None:
    evaluations = make_evaluations()
    evaluations[key_of("kan", 1, 1, "prose")].nats[2] = np.nan
    with pytest.raises(UserError, match="the loss of kan on prose is no finite number"):
        write_results(tmp_path, derived(make_records(evaluations)), evaluations)
    assert not list(tmp_path.iterdir())


def test_a_record_names_what_was_evaluated() -> None:
    key = key_of("kan", 0, 1, "prose")
    record = Record(**asdict(key), nats=1.0, tokens=2, words=3, bytes=4)
    assert record.key == key
