"""Tables against results.json, and in a terminal of 80 columns."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kanlm.reporting.table import (
    accounting_tables,
    cost_table,
    difference_table,
    forgetting_table,
    print_accounting,
    print_results,
    quality_table,
    transfer_table,
)
from kanlm.reporting.terminal import Table, print_table


@pytest.fixture
def results(study_folder: Path) -> dict[str, Any]:
    return json.loads((study_folder / "results.json").read_text())


def cells(table: Table, *first: str) -> dict[str, str]:
    """Column → text of the row that begins with `first`."""
    row = next(row for row in table.rows if tuple(row[: len(first)]) == first)
    return dict(zip(table.columns, row, strict=True))


def test_quality_is_of_the_first_domain_after_pretraining(results: dict[str, Any]) -> None:
    table, kan = quality_table(results), results["arms"]["kan"]
    row = cells(table, "kan")
    bits = kan["bits_per_byte"][0][0]
    assert row["bits per byte"] == f"{bits:.3f}"
    low, high = kan["bits_per_byte_interval"][0][0]
    assert row["interval"] == f"{low:.3f}–{high:.3f}"
    seeds = sorted(seed[0][0] for seed in kan["bits_per_byte_by_seed"])
    assert row["range over seeds"] == f"{seeds[0]:.3f}–{seeds[1]:.3f}"
    assert row["× bigram"] == f"{bits / results['references']['prose']['bigram']:.2f}"
    assert row["perplexity by token"] == f"{kan['perplexity'][0][0]:.1f}"
    assert cells(table, "xz")["bits per byte"] == "2.361"
    assert [row[0] for row in table.rows] == ["kan", "swiglu", "gelu", "bigram", "xz"]
    assert table.title == "Prediction of prose after pretraining, test split"


def test_without_stages_every_domain_has_its_rows(
    tmp_path: Path, study_maker: Callable[..., Path]
) -> None:
    folder = study_maker(tmp_path / "study", arms=("kan", "swiglu"), seeds=(0,), stages=1)
    results = json.loads((folder / "results.json").read_text())
    table = quality_table(results)
    assert [row[:2] for row in table.rows[:5]] == [
        ["kan", "prose"],
        ["swiglu", "prose"],
        ["bigram", "prose"],
        ["xz", "prose"],
        ["kan", "code"],
    ]
    assert table.rules == [4]
    assert "range over seeds" not in table.columns
    assert "One seed" in table.note
    differences = difference_table(results)
    assert differences is not None
    assert [row[1] for row in differences.rows] == ["prose", "code"]


def test_forgetting_by_arm_and_domain(results: dict[str, Any]) -> None:
    table, kan = forgetting_table(results), results["arms"]["kan"]
    (base, new), (base_after, new_after) = kan["bits_per_byte"]
    old, fresh = cells(table, "kan", "prose"), cells(table, "kan", "code")
    assert (old["before"], old["learned"], old["final"]) == ("", f"{base:.3f}", f"{base_after:.3f}")
    assert old["forgetting"] == f"+{base_after - base:.3f}"
    assert old["gain"] == fresh["forgetting"] == ""
    assert fresh["before"] == f"{new:.3f}"
    assert fresh["gain"] == f"{new - new_after:.3f}"
    average = cells(transfer_table(results), "kan")["average final loss"]
    assert average == f"{(base_after + new_after) / 2:.3f}"


def test_differences_are_paired_and_signed(results: dict[str, Any]) -> None:
    table = difference_table(results)
    assert table is not None
    row = cells(table, "kan − gelu", "prose, after pretraining")
    pair = next(
        p for p in results["comparisons"] if p["other"] == "gelu" and p["domain"] == "prose"
    )
    assert pair["difference"] < 0
    assert row["bits per byte"] == f"−{-pair['difference']:.3f}"
    # Three pairs after pretraining, and at the end on either domain.
    assert len(table.rows) == 9


def test_cost_keeps_units_and_labels(results: dict[str, Any]) -> None:
    table = cost_table(results)
    row = cells(table, "kan")
    assert row["params"] == "1.05 M"
    assert row["training time"] == "1.64 min"
    assert row["peak memory"] == "912 MB"
    assert "kan is kan/bspline1-g6-silu" in table.note
    results["arms"] = {n: {**a, "peak_memory_bytes": None} for n, a in results["arms"].items()}
    assert "peak memory" not in cost_table(results).columns


def test_more_stages_show_what_two_cannot(results: dict[str, Any]) -> None:
    results["domains"].append("law")
    for arm in results["arms"].values():
        arm["bits_per_byte"] = [[2.0, 3.0, 4.0], [2.5, 1.5, 3.5], [2.2, 1.8, 1.0]]
        arm["forgetting_from_best"] = {"prose": 0.2, "code": 0.3}
        arm["forward_transfer"] = {"code": 0.0, "law": 0.5}
    row = cells(transfer_table(results), "kan")
    assert row["forgetting from best"] == "+0.250"
    # The second domain's is 0 by definition and left out.
    assert row["forward transfer"] == "+0.500"


def test_the_terminal_shows_whole_words_in_80_columns(
    study_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_results(study_folder / "results.json")
    text = capsys.readouterr().out
    words = text.split()
    for word in ("swiglu", "params", "forgetting", "interval", "tokens/s", "memory", "xz"):
        assert word in words
    assert "swiglu is ahead of kan" in " ".join(words)
    assert max(map(len, text.splitlines())) <= 80


def test_accounting_by_part(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass
    class Accounting:
        parameters: dict[str, int]
        flops_per_token: dict[str, int]
        active_parameters: int
        decoded_parameters: int

    account = Accounting(
        parameters={"embedding": 1000, "feed_forward": 2345, "total": 3345},
        flops_per_token={"feed_forward": 4690, "total": 4690},
        active_parameters=3000,
        decoded_parameters=2500,
    )
    print_accounting({"kan": account, "swiglu": account})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["kan", "1,000", "2,345", "3,345", "3,000"] in lines
    assert ["swiglu", "4.69", "k", "4.69", "k", "10.0", "kB"] in lines


def test_parts_that_an_arm_lacks_count_nothing() -> None:
    rest = {"flops_per_token": {}, "active_parameters": 5, "decoded_parameters": 5}
    accounts = {
        "a": {"parameters": {"head": 5}, **rest},
        "b": {"parameters": {"gate": 7}, **rest},
    }
    table = accounting_tables(accounts)[0]
    assert table.columns == ["arm", "head", "gate", "active"]
    assert table.rows == [["a", "5", "0", "5"], ["b", "0", "7", "5"]]


def test_notes_stand_with_their_figures(
    tmp_path: Path, study_maker: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = study_maker(tmp_path / "study", arms=("kan", "swiglu"), seeds=(0,), stages=1)
    results = json.loads((folder / "results.json").read_text())
    assert "note" not in quality_table(results).columns
    unfinished = "unfinished: step 300 of 900"
    results["notes"] = [
        {"arm": "swiglu", "domain": "code", "note": "trained on this text"},
        {"arm": "kan", "domain": None, "note": unfinished},
        {"arm": "swiglu", "domain": None, "note": unfinished},
        {"arm": None, "domain": "code", "note": "7 rows without a text"},
        {"arm": None, "domain": None, "note": "all of it"},
    ]
    table = quality_table(results)
    marks = [[*row[:2], row[3]] for row in table.rows if row[0] in ("kan", "swiglu")]
    assert marks == [
        ["kan", "prose", "[1]"],
        ["swiglu", "prose", "[1]"],
        ["kan", "code", "[1]"],
        ["swiglu", "code", "[1] [2]"],
    ]
    assert table.footnotes == [
        "Scored: 89.9 kB of prose, 89.9 kB of code.",
        "code: 7 rows without a text",
        "all of it",
        f"[1] {unfinished}",
        "[2] trained on this text",
    ]
    print_table(table)
    printed = capsys.readouterr().out
    assert all(line in printed for line in table.footnotes)


def test_the_notes_of_later_domains_stand_with_what_was_learned(results: dict[str, Any]) -> None:
    results["notes"] = [
        {"arm": None, "domain": "prose", "note": "3 empty documents left out"},
        {"arm": None, "domain": "code", "note": "7 rows without a text"},
        {"arm": "gelu", "domain": "code", "note": "unfinished"},
    ]
    assert not any("7 rows" in line for line in quality_table(results).footnotes)
    table = forgetting_table(results)
    assert cells(table, "gelu", "code")["note"] == "[1]"
    assert cells(table, "gelu", "prose")["note"] == cells(table, "kan", "code")["note"] == ""
    assert table.footnotes[1:] == [
        "prose: 3 empty documents left out",
        "code: 7 rows without a text",
        "[1] unfinished",
    ]


def test_steps_left_out_are_counted_where_the_figure_stands(results: dict[str, Any]) -> None:
    results["arms"]["kan"].update(steps=1800, skipped_steps=1234)
    table = quality_table(results)
    assert (cells(table, "kan")["note"], cells(table, "gelu")["note"]) == ("[1]", "")
    assert table.footnotes[1:] == [
        "[1] 1,234 of 1,800 steps were left out: no finite loss, or a leap"
    ]


def test_arms_of_unequally_many_seeds_say_how_many(results: dict[str, Any]) -> None:
    assert "seeds" not in quality_table(results).columns
    results["arms"]["kan"]["seeds"] = [0, 1, 2]
    table = quality_table(results)
    assert (cells(table, "kan")["seeds"], cells(table, "gelu")["seeds"]) == ("3", "2")


def test_every_table_names_its_split(results: dict[str, Any]) -> None:
    for record in results["records"]:
        record["split"] = "validation"
    tables = quality_table(results), difference_table(results)
    assert all(table is not None and "validation split" in table.title for table in tables)
    assert "validation split" in forgetting_table(results).note
    assert "validation split" in transfer_table(results).note
