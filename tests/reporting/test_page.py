"""The page is whole, self-contained, escaped and the same every time."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kanlm.errors import UserError
from kanlm.reporting.page import write_report

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Checker(HTMLParser):
    """Collects tags, ids, links and visible text; fails on tags that do not close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def test_a_study_has_every_part(study_folder: Path) -> None:
    path = write_report(study_folder)
    assert path == study_folder / "report.html"
    page = check(path.read_text())
    headings = [
        "Results",
        "Learning curves",
        "What each stage did to each domain",
        "Forgetting beside learning",
        "Accounting",
        "Samples",
        "Provenance",
        "Definitions",
    ]
    places = [page.text.index(heading) for heading in headings]
    assert places == sorted(places)
    # Curves of two domains, three matrices, one scatter.
    assert page.tags.count("svg") == 6
    assert page.tags.count("table") == 7
    for text in ("3f8c0f7bd2c4e3b0", "AMD EPYC 7763", "torch 2.13.0", "d_model: 128", "swiglu is"):
        assert text in page.text
    # One sample an arm and stage, of the first seed.
    assert page.text.count("after prose, seed 0") == page.text.count("after code, seed 0") == 3


def test_nothing_is_fetched_and_no_id_repeats(study_folder: Path) -> None:
    html = write_report(study_folder).read_text()
    page = check(html)
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", html)) <= set(page.ids)
    assert not re.search(r"@import|url\((?!#)", html)
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert len(page.ids) == len(set(page.ids))


def test_text_of_models_and_people_is_escaped(
    tmp_path: Path, study_maker: Callable[..., Path]
) -> None:
    folder = study_maker(tmp_path / "a <b> & $c$", arms=("kan",))
    results = json.loads((folder / "results.json").read_text())
    hostile = "<script>$x_1$ & co"
    results["arms"] = {hostile: results["arms"]["kan"]}
    results["records"] = [{**record, "arm": hostile} for record in results["records"]]
    (folder / "kan").rename(folder / hostile)
    (folder / "results.json").write_text(json.dumps(results))
    page = check(write_report(folder).read_text())
    assert "script" not in page.tags
    # <b> stands in the captions of tables only.
    assert page.tags.count("b") == page.tags.count("table")
    assert hostile in page.text
    # The samples of the study hold markup too.
    assert "items <b>in</b> the mapping" in page.text
    assert "a <b> & $c$" in page.text


def test_a_single_run_is_a_study_of_one_arm(run_folder: Path) -> None:
    page = check(write_report(run_folder).read_text())
    assert "kan predicts prose at 2.1" in page.text
    assert page.tags.count("svg") == 2
    assert "Forgetting" not in page.text
    assert "Return the number" in page.text


def test_a_study_without_logs_still_has_its_results(study_folder: Path) -> None:
    for path in study_folder.rglob("metrics.jsonl"):
        path.unlink()
    page = check(write_report(study_folder).read_text())
    assert "Learning curves" not in page.text
    assert "Samples" not in page.text
    assert "Differences" in page.text


def test_the_same_folder_gives_the_same_page(study_folder: Path) -> None:
    first = write_report(study_folder).read_bytes()
    assert write_report(study_folder).read_bytes() == first
    assert not list(study_folder.glob(".*"))


def test_trials_of_a_sweep_are_no_runs_of_the_study(study_folder: Path) -> None:
    before = write_report(study_folder).read_bytes()
    run = study_folder / "kan" / "seed-0" / "stage-0-prose"
    trial = study_folder / "kan" / "trials" / "optimizer.learning_rate=0.01"
    trial.mkdir(parents=True)
    for name in ("metrics.jsonl", "config.yaml"):
        (trial / name).write_bytes((run / name).read_bytes())
    assert write_report(study_folder).read_bytes() == before


def test_a_sweep_is_shown_with_what_was_not_chosen(
    study_folder: Path, sweep_maker: Callable[..., dict]
) -> None:
    path = study_folder / "results.json"
    results = json.loads(path.read_text())
    for name, arm in results["arms"].items():
        arm["sweep"] = sweep_maker({0.001: 2.4, 0.003: 2.2, 0.01: 2.1 if name == "kan" else None})
    path.write_text(json.dumps(results))
    page = check(write_report(study_folder).read_text())
    assert page.tags.count("svg") == 7
    for said in (
        "Trials: bits per byte of prose, validation split",
        "▸ 2.100",
        "diverged",
        "kan: learning_rate 0.01 is the largest of its grid: better ones may lie beyond it",
        "the largest optimizer.learning_rate of its grid was best for kan (0.01). A larger one",
    ):
        assert said in page.text


def test_a_folder_without_results_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.json cannot be read: No such file"):
        write_report(tmp_path)


def test_a_page_that_cannot_be_written_is_named_and_the_last_one_stays(study_folder: Path) -> None:
    before = write_report(study_folder).read_bytes()
    # A link that would have been followed, and then a folder that cannot be replaced.
    (study_folder / ".report.html.draft").symlink_to(study_folder / "results.json")
    assert write_report(study_folder).read_bytes() == before
    (study_folder / ".report.html.draft").mkdir()
    with pytest.raises(UserError, match=r"report\.html cannot be written: Is a directory"):
        write_report(study_folder)
    assert (study_folder / "report.html").read_bytes() == before


def test_a_stage_whose_log_is_gone_has_no_curve(study_folder: Path) -> None:
    for path in study_folder.glob("*/seed-*/stage-1-code/metrics.jsonl"):
        path.unlink()
    page = check(write_report(study_folder).read_text())
    assert "Learning curves" in page.text


def test_a_log_that_a_kill_cut_short_is_shown_as_far_as_it_is_whole(run_folder: Path) -> None:
    path = run_folder / "metrics.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[:-1]))
    before = write_report(run_folder).read_bytes()
    path.write_bytes(b"".join(whole)[:-20])
    assert write_report(run_folder).read_bytes() == before


def test_a_link_out_of_a_run_is_not_shown(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("password")
    (run_folder / "config.yaml").unlink()
    (run_folder / "config.yaml").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"config\.yaml is a link that leads out of its folder"):
        write_report(run_folder)


def test_a_run_without_a_finite_loss_has_a_report(run_folder: Path) -> None:
    path = run_folder / "results.json"
    results = json.loads(path.read_text())
    for arm in results["arms"].values():
        arm["bits_per_byte"] = [[None, None]]
        arm["bits_per_byte_by_seed"] = [[[None, None]]]
    path.write_text(json.dumps(results))
    assert "No loss on prose was a finite number." in write_report(run_folder).read_text()


def test_a_report_needs_neither_torch_nor_what_it_takes_to_train() -> None:
    code = (
        "import sys, kanlm.reporting.page; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
