"""Studies end to end on tiny runs: what is run, what is chosen, and what is written.

Runs are started in this process in place of processes of their own, which take seconds each
to import torch; the test of a killed study starts real ones.
"""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from kanlm.cli import main
from kanlm.config import from_tree, load
from kanlm.data.loader import Batches
from kanlm.experiments import launch, study
from kanlm.experiments.collect import combine_facts
from kanlm.model.accounting import account
from kanlm.model.matching import feed_forward_cost
from kanlm.reporting.format import count
from kanlm.training.resolve import resolve
from kanlm.training.run_folder import claim, write_config

ARMS = {"kan": {}, "gelu": {"model": {"feed_forward": "gelu"}}}
RATES = [1e-5, 1e-2]
SHORT = {
    "model": {"dropout": 0.0},
    "training": {"steps": 6, "log_every": 2, "evaluate_every": 3, "checkpoint_every": 2},
}
CODE = ["def", "return", "(", ")", ":", "self", "x", "y", "=", "0", "1"]
LAW = ["whereas", "party", "shall", "hereby", "clause", "§", "thereof", "and"]


@dataclass
class Started:
    """The runs that a study started, in order, and by step the batches they trained on."""

    folders: list[Path] = field(default_factory=list)
    batches: dict[Path, dict[int, str]] = field(default_factory=lambda: defaultdict(dict))


@pytest.fixture(scope="module")
def here() -> Iterator[Started]:
    """Start runs in this process, and note which."""
    started = Started()

    class Process:
        def __init__(self, command: list[str]) -> None:
            self.words = command[3:]
            self.code: int | None = None

        def wait(self) -> int:
            if self.code is None:
                started.folders.append(Path(self.words[1]).parent)
                self.code = 0
                try:
                    main(self.words)
                except SystemExit as stop:
                    self.code = int(stop.code or 0)
            return self.code

    whole = Batches.batch

    def noted(self: Batches, step: int, rank: int = 0, world_size: int = 1) -> Any:
        batch = whole(self, step, rank, world_size)
        digest = hashlib.sha256(batch["input_ids"].numpy().tobytes()).hexdigest()
        started.batches[started.folders[-1]][step] = digest
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "subprocess", SimpleNamespace(Popen=Process))
        patch.setattr(Batches, "batch", noted)
        yield started


def files(folder: Path) -> list[Path]:
    """What is in a folder, but for the lock, which may stay where something has begun."""
    return sorted(path for path in folder.rglob("*") if path.name != ".lock")


def write(folder: Path, tree: dict[str, Any]) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def validation(step: int, bits_per_byte: float) -> str:
    """A line of metrics.jsonl."""
    values = {"domain": "words", "nats_per_token": 2.0, "bits_per_byte": bits_per_byte}
    return json.dumps({"kind": "validation", "step": step, **values}) + "\n"


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def facts_of(folder: Path) -> dict[str, Any]:
    (facts,) = results_of(folder)["arms"].values()
    return facts


@dataclass
class Study:
    """A finished study: its config, its folder and what it started."""

    path: Path
    folder: Path
    started: list[Path]
    batches: dict[Path, dict[int, str]]

    @property
    def results(self) -> dict[str, Any]:
        return results_of(self.folder)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, make_tree, here: Started) -> Study:
    folder = tmp_path_factory.mktemp("compare")
    settings = {"arms": ARMS, "seeds": [0, 1], "grid": {"optimizer.learning_rate": RATES}}
    path = write(folder, make_tree(folder, **SHORT, study=settings))
    first = len(here.folders)
    main(["compare", str(path)])
    return Study(path, folder / "run", here.folders[first:], here.batches)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, make_text) -> list[dict[str, Any]]:
    """Two domains to learn after the words, the second with a shorter recipe."""
    folder = tmp_path_factory.mktemp("domains")
    parts = []
    for name, words in (("code", CODE), ("law", LAW)):
        (folder / f"{name}.txt").write_text(make_text(words))
        source = {"kind": "files", "path": str(folder / f"{name}.txt"), "separator": "\n\n\n"}
        parts.append({"data": {"domain": name, "sources": [source]}})
    parts[1]["training"] = {"steps": 4}
    return parts


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory, make_tree, here: Started, stages) -> Study:
    folder = tmp_path_factory.mktemp("continual")
    path = write(folder, make_tree(folder, **SHORT, study={"arms": ARMS, "stages": stages}))
    first = len(here.folders)
    main(["continual", str(path)])
    return Study(path, folder / "run", here.folders[first:], here.batches)


# What is written

TOP = {"schema_version", "records", "domains", "arms", "provenance"}
OF_AN_ARM = {
    *("feed_forward", "parameters", "feed_forward_parameters", "flops_per_token"),
    *("train_tokens", "train_seconds", "compile_seconds", "tokens_per_second"),
    *("peak_memory_bytes", "seeds"),
    *("bits_per_byte", "bits_per_byte_by_seed", "perplexity", "perplexity_by_seed"),
    *("forgetting", "learning_gain", "backward_transfer"),
}
OF_A_RECORD = {
    *("arm", "seed", "strategy", "stage", "domain", "step"),
    *("nats", "tokens", "words", "bytes"),
}


@pytest.mark.parametrize("which", ["compared", "continued"])
def test_results_hold_what_was_promised(which, request):
    finished: Study = request.getfixturevalue(which)
    results = finished.results
    assert set(results) >= TOP
    assert list(results["arms"]) == ["kan", "gelu"]
    for arm in results["arms"].values():
        assert set(arm) >= OF_AN_ARM
    for record in results["records"]:
        assert set(record) >= OF_A_RECORD
    provenance = results["provenance"]
    assert set(provenance) >= {"commit", "versions", "hardware", "config_hash", "data_hash"}
    assert set(provenance["data_hash"]) == set(results["domains"])
    assert (finished.folder / "report.html").stat().st_size > 1000
    lines = (finished.folder / "documents.jsonl").read_text().splitlines()
    assert len(lines) == len(results["records"])


def sums_by_hand(finished: Study) -> dict[tuple[str, int, int, str], dict[str, Any]]:
    """Record of (arm, seed, stage, domain), read from the runs' own folders."""
    found = {}
    for place in finished.folder.glob("*/seed-*/stage-*"):
        stage, seed = place.name.split("-")[1], place.parent.name.split("-")[1]
        for record in results_of(place)["records"]:
            key = place.parents[1].name, int(seed), int(stage), record["domain"]
            found[key] = record
    return found


@pytest.mark.parametrize(("which", "shape"), [("compared", (2, 1, 1)), ("continued", (1, 3, 3))])
def test_matrices_are_those_of_the_runs_records(which, shape, request):
    finished: Study = request.getfixturevalue(which)
    results, by_hand = finished.results, sums_by_hand(finished)
    assert len(by_hand) == len(results["records"]) == 2 * math.prod(shape)
    for name, arm in results["arms"].items():
        bits, nats = np.zeros(shape), np.zeros(shape)
        for (owner, seed, stage, domain), record in by_hand.items():
            if owner == name:
                cell = arm["seeds"].index(seed), stage, results["domains"].index(domain)
                bits[cell] = record["nats"] / math.log(2) / record["bytes"]
                nats[cell] = record["nats"] / record["tokens"]
        np.testing.assert_allclose(arm["bits_per_byte_by_seed"], bits, rtol=1e-12)
        np.testing.assert_allclose(arm["bits_per_byte"], bits.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(arm["perplexity_by_seed"], np.exp(nats), rtol=1e-12)
        np.testing.assert_allclose(arm["perplexity"], np.exp(nats.mean(axis=0)), rtol=1e-12)


def test_forgetting_and_gain_are_differences_in_the_matrix(continued):
    assert continued.results["domains"] == ["words", "code", "law"]
    for arm in continued.results["arms"].values():
        matrix = np.array(arm["bits_per_byte"])
        lost = {"words": matrix[2, 0] - matrix[0, 0], "code": matrix[2, 1] - matrix[1, 1]}
        assert arm["forgetting"] == pytest.approx(lost)
        assert arm["backward_transfer"] == pytest.approx(-sum(lost.values()) / 2)
        gained = {"code": matrix[0, 1] - matrix[1, 1], "law": matrix[1, 2] - matrix[2, 2]}
        assert arm["learning_gain"] == pytest.approx(gained)


def test_each_stage_goes_on_from_the_one_before(continued):
    for arm in ARMS:
        place = continued.folder / arm / "seed-0"
        configs = [
            load(place / f"stage-{stage}-{domain}" / "config.yaml")
            for stage, domain in enumerate(("words", "code", "law"))
        ]
        assert configs[0].initialize_from is None
        assert configs[1].initialize_from == str(place / "stage-0-words")
        assert configs[2].initialize_from == str(place / "stage-1-code")
        assert [config.training.steps for config in configs] == [6, 6, 4]
        assert len({json.dumps(config.model.feed_forward) for config in configs}) == 1


def test_facts_of_an_arm_are_those_of_its_runs(continued):
    for name, arm in continued.results["arms"].items():
        runs = [facts_of(place) for place in (continued.folder / name / "seed-0").iterdir()]
        assert len(runs) == 3
        assert arm["train_tokens"] == sum(run["train_tokens"] for run in runs) == 16 * 4 * 16
        assert arm["train_seconds"] == pytest.approx(sum(run["train_seconds"] for run in runs))
        assert arm["tokens_per_second"] == pytest.approx(arm["train_tokens"] / arm["train_seconds"])
        assert arm["peak_memory_bytes"] == max(run["peak_memory_bytes"] for run in runs)
        assert arm["parameters"] == runs[0]["parameters"]


def test_facts_are_summed_over_stages_and_averaged_over_seeds():
    def fact(tokens: int, seconds: float, memory: int) -> dict[str, Any]:
        named = ("feed_forward", "parameters", "feed_forward_parameters", "flops_per_token")
        return {
            **dict.fromkeys((*named, "bytes_per_decoded_token", "accounting"), 7),
            "train_tokens": tokens,
            "train_seconds": seconds,
            "compile_seconds": seconds / 2,
            "peak_memory_bytes": memory,
            "steps": tokens // 4,
            "skipped_steps": 1,
        }

    facts = combine_facts(
        [[fact(100, 10.0, 5), fact(20, 2.0, 9)], [fact(100, 14.0, 6), fact(20, 6.0, 3)]]
    )
    assert (facts["train_tokens"], facts["train_seconds"]) == (120, 16.0)
    assert facts.get("compile_seconds") == 8.0
    assert facts["tokens_per_second"] == pytest.approx(120 / 16)
    assert facts["peak_memory_bytes"] == 9
    assert (facts["steps"], facts["skipped_steps"]) == (60, 4)


# Arms


def test_twins_match_to_a_hundredth_or_a_unit_of_width(compared):
    arms = compared.results["arms"]
    config = load(compared.folder / "gelu" / "seed-1" / "stage-0-words" / "config.yaml")
    spec = config.model.feed_forward_by_layer[0]
    wider = {**spec, "hidden": spec["hidden"] + 1}
    unit = feed_forward_cost(wider, 16, "parameters") - feed_forward_cost(spec, 16, "parameters")
    reference = arms["kan"]["feed_forward_parameters"]
    difference = abs(arms["gelu"]["feed_forward_parameters"] - reference)
    assert difference <= max(0.01 * reference, unit * config.model.n_layers)
    others = {n: a["parameters"] - a["feed_forward_parameters"] for n, a in arms.items()}
    assert others["kan"] == others["gelu"]


def test_an_arm_that_states_its_width_is_left_alone(tmp_path, make_tree):
    arms = {**ARMS, "wide": {"model": {"feed_forward": {"kind": "gelu", "hidden": 99}}}}
    config = resolve(from_tree(make_tree(tmp_path, study={"arms": arms})))
    widths = {a.name: a.config.model.feed_forward_by_layer[0]["hidden"] for a in study.plan(config)}
    assert widths["wide"] == 99
    assert widths["gelu"] != 99


def test_the_trial_of_least_validation_loss_is_selected_and_used_by_other_seeds(compared):
    for arm in ARMS:
        losses = {}
        for place in (compared.folder / arm / "trials").iterdir():
            lines = map(json.loads, (place / "metrics.jsonl").read_text().splitlines())
            seen = [line["bits_per_byte"] for line in lines if line["kind"] == "validation"]
            losses[load(place / "config.yaml").optimizer.learning_rate] = seen[-1]
        assert sorted(losses) == RATES
        best = min(losses, key=losses.__getitem__)
        for seed in (0, 1):
            place = compared.folder / arm / f"seed-{seed}" / "stage-0-words"
            assert load(place / "config.yaml").optimizer.learning_rate == best
        sweep = compared.results["arms"][arm]["sweep"]
        assert (sweep["seed"], sweep["domain"], sweep["other_trials"]) == (0, "words", 0)
        for trial, rate in zip(sweep["trials"], RATES, strict=True):
            assert trial == {
                "settings": {"optimizer.learning_rate": rate},
                "state": "finished",
                "bits_per_byte": losses[rate],
                "step": 6,
                "chosen": rate == best,
            }
        edge = "smallest" if best == RATES[0] else "largest"
        assert sweep["edges"] == [
            {"setting": "optimizer.learning_rate", "value": best, "edge": edge}
        ]


def test_all_arms_train_on_the_same_batches_and_seeds_on_others(compared):
    by_seed = defaultdict(list)
    for place in compared.started:
        by_seed[load(place / "config.yaml").seed].append(compared.batches[place])
    # Two arms try two rates with the first seed, and use the better with the other.
    assert {seed: len(runs) for seed, runs in by_seed.items()} == {0: 4, 1: 2}
    for runs in by_seed.values():
        assert all(len(run) == 6 and run == runs[0] for run in runs)
    assert not set(by_seed[0][0].values()) & set(by_seed[1][0].values())


# Starting again


@pytest.mark.parametrize(("which", "verb"), [("compared", "compare"), ("continued", "continual")])
def test_nothing_that_is_finished_runs_again(which, verb, request, here):
    finished: Study = request.getfixturevalue(which)
    before, started = finished.results, len(here.folders)
    main([verb, str(finished.path)])
    assert len(here.folders) == started
    assert finished.results == before


def test_a_study_may_grow_and_finalists_alone_take_more_seeds(compared, tmp_path, here):
    shutil.copytree(compared.folder, tmp_path / "run")
    first = len(here.folders)
    reference, other = ARMS
    more = [f"output_dir={tmp_path}/run", "study.seeds=[0,1,2]", "study.finalists=1"]
    main(["compare", str(compared.path), *more])
    assert here.folders[first:] == [tmp_path / "run" / reference / "seed-2" / "stage-0-words"]
    arms = results_of(tmp_path / "run")["arms"]
    assert {name: arm["seeds"] for name, arm in arms.items()} == {reference: [0, 1, 2], other: [0]}
    earlier = compared.results["arms"]
    for name, seeds in ((reference, 2), (other, 1)):
        kept = arms[name]["bits_per_byte_by_seed"][:seeds]
        assert kept == earlier[name]["bits_per_byte_by_seed"][:seeds]


def test_a_trial_that_diverges_ends_itself_alone(tmp_path, make_tree, here, capsys):
    training = {**SHORT["training"], "max_skipped_steps": 2}
    grid = {"optimizer.learning_rate": [1e-3, 1e38]}
    tree = make_tree(tmp_path, **{**SHORT, "training": training}, study={"arms": {"kan": {}}})
    tree["study"]["grid"] = grid
    texts = (tmp_path / "words.txt").read_text().split("\n\n\n")
    rows = [*({"text": text} for text in texts), {"text": None}]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree["data"]["sources"] = [{"kind": "files", "path": str(tmp_path / "words.jsonl")}]
    main(["compare", str(write(tmp_path, tree))])
    # What was left out of the text has come from the run to the study.
    note = {"arm": None, "domain": "words", "note": "rows without text left out: 1"}
    assert note in results_of(tmp_path / "run")["notes"]
    assert "words: rows without text left out: 1" in (printed := capsys.readouterr().out)
    sweep = results_of(tmp_path / "run")["arms"]["kan"]["sweep"]
    good, bad = sweep["trials"]
    assert (good["state"], good["chosen"]) == ("finished", True)
    assert (bad["state"], bad["chosen"], bad["bits_per_byte"]) == ("diverged", False, None)
    # The larger rate was tried, so the smaller one alone is at an edge.
    assert [edge["edge"] for edge in sweep["edges"]] == ["smallest"]
    assert "learning_rate=1e+38 diverged; the others go on" in printed
    started = len(here.folders)
    main(["compare", str(tmp_path / "study.yaml")])
    assert len(here.folders) == started
    # Nothing is chosen where all diverge.
    only = "study.grid={optimizer.learning_rate: [1e38, 2e38]}"
    words = ["compare", str(tmp_path / "study.yaml"), only, f"output_dir={tmp_path / 'other'}"]
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "study.arms.kan: all 2 trials of its grid diverged" in capsys.readouterr().err


def test_a_grown_grid_whose_best_is_another_says_what_to_delete(compared, tmp_path, capsys, here):
    shutil.copytree(compared.folder, tmp_path / "run")
    arm = compared.results["arms"]["kan"]["sweep"]["trials"]
    (before,) = [t["settings"]["optimizer.learning_rate"] for t in arm if t["chosen"]]
    (other,) = [rate for rate in RATES if rate != before]
    trial = tmp_path / "run" / "kan" / "trials" / f"optimizer.learning_rate={other}"
    with (trial / "metrics.jsonl").open("a") as log:
        log.write(validation(6, 0.5))
    words = ["compare", str(compared.path), f"output_dir={tmp_path}/run"]
    with pytest.raises(SystemExit):
        main(words)
    line = capsys.readouterr().err
    assert f"optimizer.learning_rate = {other} is best, and {tmp_path}/run/kan/seed-0, " in line
    assert f"were trained with {before}; delete these folders" in line
    # A smaller grid leaves a trial out, which is counted.
    first = len(here.folders)
    for place in (tmp_path / "run").glob("*/seed-*"):
        shutil.rmtree(place)
    both = f"study.grid={{optimizer.learning_rate: [{other}, 2e-3]}}"
    main([*words, both, "study.seeds=[0]"])
    assert len(here.folders) == first + 2
    assert results_of(tmp_path / "run")["arms"]["kan"]["sweep"]["other_trials"] == 1


def test_finalists_are_the_reference_and_the_best_of_the_others(compared, tmp_path):
    arms = [study.Arm(name, load(compared.path), ({},)) for name in ("a", "b", "c", "d")]
    chains = []
    for arm, loss in zip(arms, (9.0, 1.0, 3.0, 2.0), strict=True):
        place = tmp_path / arm.name
        shutil.copytree(compared.folder / "kan" / "seed-0" / "stage-0-words", place)
        with (place / "metrics.jsonl").open("a") as log:
            log.write(validation(6, loss))
        chains.append([replace(arm.config, output_dir=str(place))])
    for number, names in ((1, "a"), (3, "abd"), (9, "abdc")):
        assert "".join(arm.name for arm in study._finalists(arms, chains, number)) == names


@pytest.mark.slow
def test_a_killed_study_goes_on_and_ends_with_the_same_numbers(tmp_path, continued):
    """SIGKILL takes the study and its run away in the middle of the second arm's first stage."""
    tree = {**yaml.safe_load(continued.path.read_text()), "output_dir": str(tmp_path / "killed")}
    tree["training"] = {**tree["training"], "steps": 200, "evaluate_every": 100}
    tree["study"] = {**tree["study"], "stages": tree["study"]["stages"][:1]}
    path = write(tmp_path, tree)
    command = [sys.executable, "-m", "kanlm", "continual", str(path)]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    place = tmp_path / "killed" / "gelu" / "seed-0" / "stage-0-words"
    try:
        while process.poll() is None and not (place / "checkpoints" / "latest").exists():
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (place / "results.json").exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    whole = write(tmp_path, {**tree, "output_dir": str(tmp_path / "whole")})
    subprocess.run([*command[:-1], str(whole)], check=True, stdout=subprocess.DEVNULL)
    killed, uninterrupted = results_of(tmp_path / "killed"), results_of(tmp_path / "whole")
    assert len(killed["records"]) == 8
    assert killed["records"] == uninterrupted["records"]


# Refusals


@pytest.fixture
def refuse(
    tmp_path: Path, make_tree, capsys: pytest.CaptureFixture[str], here: Started
) -> Callable[..., str]:
    """Calls a study that must be refused in one line, with nothing run and nothing written."""

    def refuse(verb: str = "compare", **parts: Any) -> str:
        path = write(tmp_path, make_tree(tmp_path, **{**SHORT, **parts}))
        started = len(here.folders)
        with pytest.raises(SystemExit) as caught:
            main([verb, str(path)])
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert error.startswith("kanlm: ")
        assert error.count("\n") == 1
        assert len(here.folders) == started
        assert not (tmp_path / "run").exists()
        return error

    return refuse


def test_unequally_many_trials_are_refused(refuse):
    grid = {"optimizer.learning_rate": RATES}
    one = {"gelu": {"optimizer.learning_rate": [1e-3]}}
    line = refuse(study={"arms": ARMS, "grid": grid, "arm_grids": one})
    assert "arms must have equally many trials, not kan 2, gelu 1" in line


def test_an_unknown_setting_in_a_grid_or_an_arm_or_a_stage_is_refused(refuse, stages):
    line = refuse(study={"arms": ARMS, "grid": {"optimizer.learning_rat": RATES}})
    assert "unknown setting 'optimizer.learning_rat'; did you mean 'learning_rate'?" in line
    line = refuse(study={"arms": {**ARMS, "bad": {"modle": {"d_model": 8}}}})
    assert "study.arms.bad: unknown setting 'modle'; did you mean 'model'?" in line
    last = {**stages[1], "trainig": {"steps": 3}}
    line = refuse("continual", study={"arms": ARMS, "stages": [stages[0], last]})
    assert "unknown setting 'trainig'; did you mean 'training'?" in line


def test_a_stage_is_refused_before_the_first_is_trained(refuse, stages, tmp_path):
    missing = {"data": {"domain": "x", "sources": [{"kind": "files", "path": "gone.txt"}]}}
    line = refuse("continual", study={"arms": ARMS, "stages": [stages[0], missing]})
    assert "'gone.txt': no such file" in line
    other = {**stages[1], "tokenizer": "characters"}
    line = refuse("continual", study={"arms": ARMS, "stages": [other]})
    assert "tokenizer.kind = characters differs from bytes" in line
    (tmp_path / "short.txt").write_text("too short")
    source = {"kind": "files", "path": str(tmp_path / "short.txt")}
    short = {"data": {"domain": "short", "sources": [source]}}
    assert "short" in refuse("continual", study={"arms": ARMS, "stages": [short]})


def test_a_strategy_is_that_of_stages_after_the_first(tmp_path, make_tree, stages, here):
    kan = {"arms": {"kan": {}}, "stages": stages[:1]}
    tree = make_tree(tmp_path, **SHORT, study=kan, strategy={"kind": "replay", "fraction": 0.5})
    main(["continual", str(write(tmp_path, {**tree, "shrink": True}))])
    first, second = sorted((tmp_path / "run" / "kan" / "seed-0").iterdir())
    assert load(first / "config.yaml").strategy == {"kind": "plain"}
    assert load(second / "config.yaml").strategy == {"kind": "replay", "fraction": 0.5}
    records = results_of(tmp_path / "run")["records"]
    assert {record["strategy"] for record in records} == {"replay"}


def test_a_strategy_that_no_stage_or_no_arm_can_use_is_refused(refuse, stages):
    assert "strategy.kind = replay needs study.stages" in refuse(
        study={"arms": ARMS}, strategy="replay"
    )
    line = refuse("continual", study={"arms": ARMS, "stages": stages}, strategy="banded")
    assert "strategy.kind = banded" in line


def test_a_hybrid_that_does_not_add_up_is_refused(refuse):
    layers = [{"kind": "gelu", "repeat": 4}, {"kind": "kan", "repeat": 2}]
    line = refuse(study={"arms": {**ARMS, "hybrid": {"model": {"feed_forward": layers}}}})
    assert "study.arms.hybrid: model: feed_forward lists 6 layers, and n_layers = 2" in line


def test_an_impossible_arm_is_named(refuse):
    bad = {"kind": "kan-single", "basis": {"kind": "bspline", "degree": 7}}
    line = refuse(study={"arms": {**ARMS, "bad": {"model": {"feed_forward": bad}}}})
    assert "study.arms.bad: degree = 7: expected 0 to 5" in line
    bad = {"kind": "kat", "groups": 3}
    line = refuse(study={"arms": {**ARMS, "bad": {"model": {"feed_forward": bad}}}})
    assert "study.arms.bad: groups = 3 does not divide the 16 channels" in line
    line = refuse(study={"arms": {**ARMS, "bad": {"model": {"feed_forward": "katt"}}}})
    assert "study.arms.bad: model.feed_forward.kind = 'katt' is unknown; did you mean 'kat'" in line


def test_stages_belong_to_continual_and_a_study_to_both(refuse, stages):
    assert "study.stages belongs to" in refuse(study={"arms": ARMS, "stages": stages})
    assert "study.stages is empty" in refuse("continual", study={"arms": ARMS})
    twice = [stages[0], stages[0]]
    line = refuse("continual", study={"arms": ARMS, "stages": twice})
    assert "each stage needs its own data.domain, not ['words', 'code', 'code']" in line
    assert "no `study:` section" in refuse()


@pytest.mark.parametrize(
    ("verb", "settings", "said"),
    [
        (
            "compare",
            {"stages": [{"data": {"domain": "code", "sources": "stdlib-code"}}]},
            "study.stages belongs to",
        ),
        ("continual", {}, "study.stages is empty"),
    ],
)
def test_a_dry_run_is_refused_for_stages_as_the_study_is(
    verb, settings, said, tmp_path, make_tree, capsys
):
    path = write(tmp_path, make_tree(tmp_path, **SHORT, study={"arms": ARMS, **settings}))
    for words in ([], ["--dry-run"]):
        with pytest.raises(SystemExit) as caught:
            main([verb, str(path), *words])
        assert caught.value.code == 2
        printed = capsys.readouterr()
        assert printed.err.startswith(f"kanlm: {said}")
        assert not printed.out


def spoil_digit(path: Path) -> None:
    """Another number, which is as possible as the true one."""
    lines = path.read_text().splitlines(keepends=True)
    values = json.loads(lines[0])
    values["nats"][0] += 1.0
    path.write_text(json.dumps(values) + "\n" + "".join(lines[1:]))


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("results.json", lambda path: path.write_bytes(path.read_bytes()[:-9]), "cannot be read"),
        ("documents.jsonl", lambda path: path.write_bytes(b"{}\n"), "line 1: expected sums"),
        ("documents.jsonl", lambda path: path.write_bytes(b""), "nothing on words"),
        ("documents.jsonl", lambda path: path.unlink(), "No such file"),
        ("documents.jsonl", spoil_digit, "results.json and documents.jsonl differ on words"),
        ("metrics.jsonl", lambda path: path.write_bytes(b"[]\n"), "line 1: expected a JSON object"),
    ],
)
def test_what_a_run_wrote_and_is_damaged_is_named(
    name, spoil, said, compared, tmp_path, capsys, here
):
    """And not averaged with the rest."""
    shutil.copytree(compared.folder, tmp_path / "run")
    place = tmp_path / "run" / "gelu" / "seed-1" / "stage-0-words"
    spoil(place / name)
    (tmp_path / "run" / "report.html").unlink()
    started = len(here.folders)
    with pytest.raises(SystemExit) as caught:
        main(["compare", str(compared.path), f"output_dir={tmp_path / 'run'}"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(place) in error
    assert said in error
    assert len(here.folders) == started
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_folder_that_holds_another_study_is_refused(compared, capsys, here):
    started = len(here.folders)
    with pytest.raises(SystemExit) as caught:
        main(["compare", str(compared.path), "training.steps=7"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "training.steps = 6" in error
    assert "the runs of a study keep their length" in error
    assert len(here.folders) == started


@pytest.mark.parametrize("begun", ["trials/a/metrics.jsonl", "seed-0/stage-0-words/config.yaml"])
def test_a_run_and_a_study_do_not_share_a_folder(begun, tmp_path, make_tree, capsys, here):
    """Both would write results.json, and a file with a `study:` section makes either."""
    path = write(tmp_path, make_tree(tmp_path, study={"arms": ARMS, "stages": []}))
    config = resolve(load(path))
    run, whole = tmp_path / "one", tmp_path / "whole"
    for folder, file in ((run, "metrics.jsonl"), (whole, f"kan/{begun}")):
        (folder / file).parent.mkdir(parents=True)
        (folder / file).touch()
        write_config(folder, config)
    started = len(here.folders)
    stage = "study.stages=[{data: {domain: more, sources: stdlib-code}}]"
    for folder, held, wanted, words in (
        (run, "a single run", "a study", ["compare", str(path)]),
        (run, "a single run", "a study", ["continual", str(path), stage]),
        (whole, "a study", "a single run", ["pretrain", str(path)]),
    ):
        before = files(folder)
        with pytest.raises(SystemExit) as caught:
            main([*words, f"output_dir={folder}"])
        assert caught.value.code == 2
        assert capsys.readouterr().err == (
            f"kanlm: output_dir = {folder} holds {held}, where {wanted} is to be written; "
            "choose another output_dir\n"
        )
        assert files(folder) == before
    assert len(here.folders) == started
    claim(run, config)
    claim(whole, config, study=True)


def test_a_failing_arm_is_named_with_where_to_look(tmp_path, make_tree, capsys, here):
    arms = {"kan": {}, "small": {"model": {"vocab_size": 100}}}
    path = write(tmp_path, make_tree(tmp_path, **SHORT, study={"arms": arms}))
    with pytest.raises(SystemExit) as caught:
        main(["compare", str(path)])
    assert caught.value.code == 2
    reason, line = capsys.readouterr().err.splitlines()
    assert reason == "kanlm: model.vocab_size = 100 is less than the tokenizer's 257"
    place = tmp_path / "run" / "small" / "seed-0" / "stage-0-words"
    assert line.startswith("kanlm: small/seed-0/stage-0-words ended with exit code 2, see above")
    assert f"kanlm pretrain {place / 'config.yaml'}" in line
    assert not (tmp_path / "run" / "results.json").exists()


# Dry run


@pytest.mark.parametrize("verb", ["compare", "continual"])
def test_a_dry_run_prints_every_arms_accounting_and_writes_nothing(
    verb, tmp_path, make_tree, stages, capsys, here, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    parts = {"study": {"arms": ARMS, "stages": stages if verb == "continual" else []}}
    path = write(tmp_path, make_tree(tmp_path, **SHORT, **parts))
    before = sorted(tmp_path.iterdir())
    started = len(here.folders)
    main([verb, str(path), "--dry-run", "model.d_model=32"])
    assert len(here.folders) == started
    assert [p for p in sorted(tmp_path.iterdir()) if p.name != "cache"] == before
    printed = capsys.readouterr().out
    config = resolve(load(path, ["model.d_model=32"]))
    for arm in study.plan(config):
        accounting = account(arm.config.model, 257)
        assert arm.name in printed
        for number in (
            accounting.parameters["feed_forward"],
            accounting.parameters["attention"],
            accounting.parameters["total"],
        ):
            assert f"{number:,}" in printed
        assert count(accounting.flops_per_token["total"]) in printed
        assert count(accounting.bytes_per_decoded_token(), "B") in printed


@pytest.mark.parametrize(
    ("grid", "reason"),
    [
        ({"optimizer.learning_rat": RATES}, "unknown setting 'optimizer.learning_rat'; did you"),
        (
            {"optimizer.learning_rate": [1e-3, -3e-3]},
            "optimizer.learning_rate = -0.003: input should be greater than 0",
        ),
        ({"optimizer.learning_rate": []}, "study: grid[optimizer.learning_rate] = []: expected"),
        ({"penalties.curvature": [0.0, 0.1]}, "penalties: "),
    ],
    ids=str,
)
def test_a_dry_run_refuses_what_the_study_would(grid, reason, tmp_path, make_tree, capsys):
    parts = {"study": {"arms": ARMS, "grid": grid}}
    path = write(tmp_path, make_tree(tmp_path, **SHORT, **parts))
    with pytest.raises(SystemExit) as caught:
        main(["compare", str(path), "--dry-run"])
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"kanlm: {reason}")
    assert printed.err.count("\n") == 1
    assert not printed.out
