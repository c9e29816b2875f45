"""results.json and metrics.jsonl that were cut off, damaged or made up end in a line."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kanlm.errors import UserError
from kanlm.reporting.page import write_report
from kanlm.results.log import read_lines
from kanlm.results.read import read_results, read_run_results

NOTE = {"arm": None, "domain": None, "note": "3 rows without a text"}


def change(path: Path, act: Callable[[dict[str, Any]], object]) -> None:
    results = json.loads(path.read_text())
    act(results)
    path.write_text(json.dumps(results))


def refused(folder: Path) -> str:
    """What a report is refused for, having left no page behind."""
    with pytest.raises(UserError) as caught:
        write_report(folder)
    assert sorted(path.name for path in folder.glob("*report*")) == []
    line = str(caught.value)
    assert "\n" not in line
    assert str(folder) in line
    return line


def arm(results: dict[str, Any]) -> dict[str, Any]:
    return results["arms"]["kan"]


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (
            lambda r: r.update(schema_version=99),
            "schema_version is 99, expected 2: another version",
        ),
        (lambda r: r.pop("arms"), "'{path}.arms' is missing"),
        (lambda r: r.update(arms={}), "arms"),
        (lambda r: r.update(records=[]), "records"),
        (lambda r: arm(r).update(parameters="many"), 'arms.kan.parameters = "many"'),
        (lambda r: arm(r).update(parameters=10**300), "arms.kan.parameters = 1000"),
        (lambda r: arm(r).update(train_seconds=-1), "arms.kan.train_seconds = -1"),
        (lambda r: arm(r)["bits_per_byte"].pop(), "bits_per_byte has 1 and 2 stages"),
        (lambda r: arm(r)["bits_per_byte"][1].pop(), "does not have the shape (2, 2)"),
        (lambda r: arm(r)["perplexity"].append([]), "perplexity does not have the shape"),
        (lambda r: arm(r)["seeds"].append(7), "bits_per_byte_by_seed does not have the shape"),
        (lambda r: arm(r)["bits_per_byte"][0].__setitem__(0, 1e200), "arms.kan.bits_per_byte.0.0"),
        (lambda r: arm(r)["forgetting"].update(law=1.0), "arms.kan.forgetting is not by domain"),
        (lambda r: arm(r)["learning_gain_by_seed"].pop(), "arms.kan.learning_gain_by_seed is not"),
        (lambda r: r["domains"].__setitem__(1, "prose"), "two domains have one name"),
        (lambda r: r["comparisons"][0].update(other="mlp"), "no arms kan and mlp"),
        (lambda r: r.pop("notes"), "notes' is missing"),
        (lambda r: r.update(notes=[{"arm": "kan"}]), "notes.0.domain"),
        (lambda r: r.update(notes=[NOTE | {"arm": "mlp"}]), "notes: no arm mlp"),
        (lambda r: r.update(notes=[NOTE | {"domain": "law"}]), "notes: no domain law"),
        (lambda r: r["records"][0].update(bytes=0), "records.0.bytes = 0"),
        (lambda r: r["provenance"].update(hardware={"cpu": "x"}), "provenance.hardware"),
        (lambda r: r["references"]["prose"].update(bigram=[]), "references.prose.bigram = []"),
    ],
)
def test_results_that_do_not_fit_are_named(
    act: Callable[[dict[str, Any]], object], said: str, study_folder: Path
) -> None:
    path = study_folder / "results.json"
    change(path, act)
    assert said.format(path=path) in refused(study_folder)


def other_digit(results: dict[str, Any]) -> None:
    results["comparisons"][0]["difference"] += 0.01


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (
            lambda r: r["records"][0].update(nats=r["records"][0]["nats"] + 1),
            "bits_per_byte_by_seed of kan on prose is not that of records",
        ),
        (
            lambda r: arm(r)["bits_per_byte_by_seed"][1][1].__setitem__(0, 2.0),
            "bits_per_byte_by_seed of kan on prose is not that of records",
        ),
        (
            lambda r: arm(r)["bits_per_byte"][0].__setitem__(1, 2.0),
            "bits_per_byte of kan on code is no mean over seeds",
        ),
        (
            lambda r: r["records"].pop(0),
            "bits_per_byte_by_seed of kan on prose is not that of records",
        ),
        (other_digit, "the difference of kan and swiglu is no mean over seeds"),
    ],
)
def test_a_figure_that_is_as_possible_but_not_the_records_is_refused(
    act: Callable[[dict[str, Any]], object], said: str, study_folder: Path
) -> None:
    change(study_folder / "results.json", act)
    assert said in refused(study_folder)


def swept() -> dict[str, Any]:
    """A sweep of two settings in which one trial diverged."""
    rows: list[tuple[float, float, float | None]] = [
        (0.001, 0.0, 2.3),
        (0.001, 0.1, 2.2),
        (0.003, 0.0, 2.1),
        (0.003, 0.1, None),
    ]
    trials = [
        {
            "settings": {"optimizer.learning_rate": rate, "optimizer.weight_decay": decay},
            "state": "diverged" if bits is None else "finished",
            "bits_per_byte": bits,
            "step": 600,
            "chosen": bits == 2.1,
        }
        for rate, decay, bits in rows
    ]
    edge = {"setting": "optimizer.learning_rate", "value": 0.003, "edge": "largest"}
    known = {"seed": 0, "domain": "prose", "split": "validation", "other_trials": 0}
    return {**known, "trials": trials, "edges": [edge]}


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda s: s["trials"][2].update(bits_per_byte=2.25), "not that of least loss"),
        (lambda s: s["trials"][1].update(chosen=True), "not that of least loss"),
        (lambda s: s["trials"][2].update(chosen=False), "not that of least loss"),
        (lambda s: s["trials"][3].update(state="finished"), "a trial has a loss if it did not"),
        (lambda s: s["trials"][0].update(state="diverged"), "a trial has a loss if it did not"),
        (lambda s: s["trials"][0]["settings"].update(seed=1), "trials of different settings"),
        (lambda s: s["edges"][0].update(value=0.01), "edges are not those of the trials"),
        (lambda s: s.update(edges=[]), "edges are not those of the trials"),
        (lambda s: s.update(domain="law"), "no domain law"),
        (lambda s: s.update(trials=[]), "arms.kan.sweep.trials"),
        (lambda s: s["trials"][0].update(state="lost"), "arms.kan.sweep.trials.0.state"),
        (lambda s: s.update(split="test"), "arms.kan.sweep.split"),
    ],
)
def test_a_choice_that_is_not_the_trials_is_refused(
    act: Callable[[dict[str, Any]], object], said: str, study_folder: Path
) -> None:
    sweep = swept()
    change(study_folder / "results.json", lambda r: arm(r).update(sweep=sweep))
    assert arm(read_results(study_folder / "results.json"))["sweep"] == sweep
    act(sweep)
    change(study_folder / "results.json", lambda r: arm(r).update(sweep=sweep))
    assert said in refused(study_folder)


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "..", "a\0b"])
def test_an_arm_does_not_lead_to_another_folder(name: str, study_folder: Path) -> None:
    def rename(results: dict[str, Any]) -> None:
        results["arms"] = {name: arm(results)}
        results["comparisons"] = []
        results["records"] = [{**r, "arm": name} for r in results["records"] if r["arm"] == "kan"]

    change(study_folder / "results.json", rename)
    assert "an arm's name is no folder's" in refused(study_folder)


def test_a_long_wrong_value_is_not_printed_in_full(study_folder: Path) -> None:
    change(study_folder / "results.json", lambda r: r.update(domains={"a": "x" * 10_000}))
    assert len(refused(study_folder)) < 600


def test_what_a_report_does_not_read_may_be_anything(study_folder: Path) -> None:
    path = study_folder / "results.json"
    change(path, lambda r: arm(r).update(more={"a": [None]}))
    assert arm(read_results(path))["more"] == {"a": [None]}


def test_a_study_is_no_single_run(study_folder: Path) -> None:
    path = study_folder / "results.json"
    with pytest.raises(UserError, match=r"results\.json holds 3 arms: it is not a single run's"):
        read_run_results(path)
    (study_folder / "metrics.jsonl").touch()
    assert "holds several arms, beside a single run's log" in refused(study_folder)


def test_a_single_run_must_know_all_that_a_study_adds_up(run_folder: Path) -> None:
    path = run_folder / "results.json"
    change(path, lambda r: arm(r).update(bytes_per_decoded_token=8, best_validation=None))
    with pytest.raises(UserError, match=r"results\.json\.arms\.kan\.best_validation = null"):
        read_run_results(path)
    change(path, lambda r: arm(r).update(best_validation={"nats_per_token": 1.5, "step": 9}))
    results, facts = read_run_results(path)
    assert facts is arm(results)


# metrics.jsonl

GOOD = [
    {"kind": "train", "step": 1, "bits_per_byte": 2.5},
    {"kind": "validation", "step": 2, "domain": "prose", "bits_per_byte": 1.5},
    {"kind": "sample", "step": 2, "prompt": "", "text": "a\u2028b"},
    {"kind": "of tomorrow", "step": 3},
]


def write_lines(path: Path, *more: bytes) -> Path:
    path.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in GOOD) + b"".join(more))
    return path


@pytest.mark.parametrize("rest", [b"", b'{"kind": "train", "st', b"\x00" * 100, b"\xff"])
def test_what_a_kill_left_behind_the_last_line_is_none(rest: bytes, tmp_path: Path) -> None:
    assert list(read_lines(write_lines(tmp_path / "metrics.jsonl", rest))) == GOOD


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"kind": "train", "st', "expected a JSON object"),
        (b"[1, 2]", "expected a JSON object"),
        (b"", "expected a JSON object"),
        (b"\xff", "expected a JSON object"),
        (b'{"a":' * 10_000, "expected a JSON object"),
        (b'{"step": 1}', "expected a kind"),
        (b'{"kind": "train", "loss": 1.0}', "expected a step"),
        (b'{"kind": "train", "step": true, "loss": 1.0}', "expected a step"),
        (b'{"kind": "train", "step": 1e999, "loss": 1.0}', "expected a step"),
        (b'{"kind": "train", "step": 9' + b"9" * 400 + b"}", "expected a step"),
        (b'{"kind": "train", "step": 1}', "expected a number for bits_per_byte"),
        (b'{"kind": "validation", "step": 1, "bits_per_byte": 1}', "expected text for domain"),
        (b'{"kind": "sample", "step": 1, "prompt": 3, "text": ""}', "expected text for prompt"),
        (b'{"kind": "sample", "step": 1, "prompt": "", "text": "\\ud800"}', "expected a JSON"),
    ],
    ids=lambda value: value[:40] if isinstance(value, bytes) else None,
)
def test_a_whole_line_that_no_run_writes_is_named(line: bytes, said: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "metrics.jsonl", line, b"\n", json.dumps(GOOD[0]).encode())
    with pytest.raises(UserError, match=re.escape(f"{path}, line 5: {said}")):
        list(read_lines(path))


@pytest.mark.parametrize("word", ["NaN", "-Infinity", "1e999", "1e200", "9" * 400])
def test_a_loss_that_is_no_number_leaves_a_gap(word: str, tmp_path: Path, run_folder: Path) -> None:
    line = f'{{"kind": "train", "step": 4, "bits_per_byte": {word}}}\n'.encode()
    *_, last = read_lines(write_lines(tmp_path / "metrics.jsonl", line))
    assert math.isnan(last["bits_per_byte"])
    with (run_folder / "metrics.jsonl").open("ab") as file:
        file.write(line)
    write_report(run_folder)
    (run_folder / "metrics.jsonl").write_bytes(line)
    write_report(run_folder)
