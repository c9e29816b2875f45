"""What is scored was not trained on, by whatever name or cut it comes, or the table says so."""

import gzip
import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from kanlm.checksums import write_checksums
from kanlm.config import from_tree, merge, to_tree
from kanlm.data.corpus import open_corpus
from kanlm.data.sources import parse_source_argument
from kanlm.errors import Interrupted, UserError
from kanlm.experiments import evaluate
from kanlm.experiments.evaluate import evaluate_runs
from kanlm.experiments.generate import generate
from kanlm.experiments.single import train
from kanlm.experiments.training_text import cut_as_known, training_texts
from kanlm.training.checkpointing.export import load_tokenizer
from kanlm.training.resolve import resolve
from kanlm.training.trainer import Trainer

WORDS = [f"w{i:03d}" for i in range(300)]


def paragraphs(seed: int, count: int = 150) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=30)) for _ in range(count)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_tree) -> Path:
    """A folder with `c/a.txt` and `c/b.txt`, and a run `run` that was trained on both."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "c").mkdir()
    for seed, name in enumerate("ab"):
        (folder / "c" / f"{name}.txt").write_text("\n\n".join(paragraphs(seed)))
    sources = [{"kind": "files", "path": "c/*.txt", "separator": "\n\n"}]
    tree = make_tree(
        folder,
        data={"sources": sources, "root": str(folder), "near_duplicate_threshold": None},
        training={"steps": 2},
    )
    train(from_tree(tree))
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of it, in which the working folder is."""
    place = Path(shutil.copytree(trained, tmp_path / "texts", dirs_exist_ok=True))
    config = place / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(trained), str(place)))
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place))
    return place


@pytest.fixture
def scored(monkeypatch) -> Callable[..., tuple[list[list[str]], list[dict[str, Any]]]]:
    """Calls evaluate_runs; returns the paragraphs that each run was scored on, and the notes."""
    found: list[list[str]] = []

    def note(subject: Any, model: Any, text: Any) -> Any:
        joined = "\n\n".join(text.splits[subject.name].texts())
        found.append([paragraph.strip() for paragraph in joined.split("\n\n")])
        return plain(subject, model, text)

    plain = evaluate._evaluate
    monkeypatch.setattr(evaluate, "_evaluate", note)

    def score(*sources: str, runs: tuple[str, ...] = ("run",), overrides: tuple[str, ...] = ()):
        found.clear()
        results = evaluate_runs([Path(run) for run in runs], list(sources), list(overrides))
        return list(found), results["notes"]

    return score


def trained_on(run: Path) -> set[str]:
    texts = list(training_texts(run))
    tokenizer = load_tokenizer(run)
    splits = [open_corpus(text.data, tokenizer).split("train") for text in texts]
    return {text.strip() for split in splits for text in split.texts()}


def link(folder: Path) -> str:
    (folder / "link.txt").symlink_to(folder / "c" / "a.txt")
    return "link.txt"


def copy(folder: Path) -> str:
    shutil.copy(folder / "c" / "a.txt", folder / "copy.txt")
    return "copy.txt"


NAMES: dict[str, Callable[[Path], str]] = {
    "relative": lambda folder: "c/a.txt",
    "absolute": lambda folder: str(folder / "c" / "a.txt"),
    "home": lambda folder: "~/c/a.txt",
    "dots": lambda folder: "c/../c/./a.txt",
    "glob": lambda folder: "c/*.txt",
    "glob of one": lambda folder: "**/a.t?t",
    "link": link,
    "copy": copy,
    "list": lambda folder: "[c/a.txt, c/b.txt]",
    "entry": lambda folder: "{kind: files, path: c/b.txt}",
}


@pytest.mark.parametrize("name", NAMES)
def test_files_of_a_run_are_cut_as_it_cut_them(name, folder, scored):
    """Whatever they are called: what the run held out is scored, and nothing else."""
    (texts,), notes = scored(NAMES[name](folder))
    assert texts
    assert not set(texts) & trained_on(folder / "run")
    assert set(texts) < set(paragraphs(0) + paragraphs(1))
    assert not notes


def test_a_file_of_the_run_and_another_are_each_cut_in_their_way(folder, scored):
    (folder / "new.txt").write_text(" ".join(paragraphs(7)))
    (texts,), notes = scored("[c/a.txt, new.txt]")
    assert set(texts) & set(paragraphs(0))
    assert not set(texts) & trained_on(folder / "run")
    assert any(text in " ".join(paragraphs(7)) for text in texts)
    assert not notes


def test_a_packed_copy_is_found_to_have_been_trained_on(folder):
    """As one document it is cut in order, and its last part is not what the run held out."""
    (folder / "a.txt.gz").write_bytes(gzip.compress((folder / "c" / "a.txt").read_bytes()))
    with pytest.raises(UserError, match=r"all .* documents of a.txt.gz .* were trained on by run"):
        evaluate_runs([Path("run")], ["a.txt.gz"], [])


def test_documents_that_hold_what_was_trained_on_are_left_out(folder, scored, capsys):
    """Old paragraphs in twos, among new ones."""
    old, new = paragraphs(0), paragraphs(7)
    rows = [f"{one} {two}" for one, two in itertools.pairwise(old)] + new
    (folder / "mixed.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in rows))
    (texts,), (note,) = scored("mixed.jsonl")
    assert set(texts) & set(new)
    assert not [text for text in texts if any(known in text for known in trained_on(Path("run")))]
    assert (note["arm"], note["domain"]) == (None, "mixed.jsonl")
    assert note["note"].endswith("are left out, for they stand in what was trained on by run")
    assert "are left out" in capsys.readouterr().out


def test_larger_shares_than_were_held_out_are_not_taken_for_held_out(folder, scored):
    (texts,), notes = scored("c/*.txt", overrides=("data.test_fraction=0.4",))
    assert not set(texts) & trained_on(folder / "run")
    (note,) = notes
    assert "are left out" in note["note"]
    (own,), notes = scored(overrides=("data.test_fraction=0.4",))
    assert own == texts
    assert notes == [note]


def test_what_the_base_run_was_trained_on_is_left_out(folder, scored):
    """The tuned run holds out more of its base's text, and has seen it all the same."""
    base = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    (folder / "new.txt").write_text("\n\n".join(paragraphs(7)))
    sources = [{"kind": "files", "path": "new.txt", "separator": "\n\n"}]
    data = {"sources": sources, "domain": "new", "test_fraction": 0.4}
    tuned = {"output_dir": "tuned", "initialize_from": "run", "data": data}
    train(from_tree(merge(base, tuned)))
    (texts,), (note,) = scored("c/*.txt", runs=("tuned",))
    assert texts
    assert not set(texts) & trained_on(folder / "run")
    assert note["note"].endswith("trained on by run")
    # And where the base is gone, nobody knows.
    (folder / "run").rename(folder / "moved")
    _, (note,) = scored("new.txt", runs=("tuned",))
    assert note["arm"] == "tuned"
    assert note["note"].startswith("whether this was trained on is not known: run is no run folder")


def test_runs_on_different_text_are_scored_on_what_neither_has_seen(folder, scored):
    """The second run takes each file for a document: all of `a` is held out, or none."""
    base = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    whole = "\n".join(paragraphs(0)) + "\n\n" + "\n".join(paragraphs(7))
    (folder / "whole.txt").write_text(whole)
    data = {"sources": [{"kind": "files", "path": "whole.txt", "separator": None}], "domain": "x"}
    train(from_tree(merge(base, {"output_dir": "other", "data": data})))
    with pytest.raises(UserError, match="that would be scored were trained on by other"):
        scored("c/a.txt", runs=("run", "other"))
    (texts, same), (note,) = scored("c/*.txt", runs=("run", "other"))
    assert texts == same
    assert set(texts) < set(paragraphs(1))
    assert "trained on by other" in note["note"]


def test_a_changed_training_text_is_said_to_be_unknown(folder, scored, capsys):
    (folder / "new.txt").write_text("\n\n".join(paragraphs(7)))
    with (folder / "c" / "b.txt").open("a") as file:
        file.write("\n\nand more")
    _, (note,) = scored("new.txt")
    assert (note["arm"], note["domain"]) == ("run", "new.txt")
    assert "not known: the text in data 'words' of run has changed since" in note["note"]
    assert "is not known" in capsys.readouterr().out
    shutil.rmtree(folder / "c")
    shutil.rmtree(folder / "cache")
    _, (note,) = scored("new.txt")
    assert "not known" in note["note"]


def test_several_texts_make_one_table(folder, scored, capsys):
    (folder / "new.txt").write_text("\n\n".join(paragraphs(7)))
    texts, notes = scored("c/*.txt", "new.txt")
    assert len(texts) == 2
    assert not notes
    table = capsys.readouterr().out
    assert table.count("Prediction of") == 1
    results = evaluate_runs([Path("run")], ["c/*.txt", "new.txt"], [], as_json=True)
    assert json.loads(capsys.readouterr().out) == results
    assert results["domains"] == ["words", "new.txt"]
    alone = evaluate_runs([Path("run")], ["new.txt"], [])
    assert (
        results["arms"]["run"]["bits_per_byte"][0][1] == alone["arms"]["run"]["bits_per_byte"][0][0]
    )
    with pytest.raises(UserError, match="two texts have the name 'words'"):
        scored("c/*.txt", "[c/a.txt, c/b.txt]")


def test_text_that_a_run_was_only_measured_on_is_cut_as_it_was(folder, scored):
    """So that the figure is the one in its own results."""
    config = folder / "run" / "config.yaml"
    tree = yaml.safe_load(config.read_text())
    (folder / "new.txt").write_text("\n\n".join(paragraphs(7)))
    sources = [{"kind": "files", "path": str(folder / "new.txt"), "separator": "\n\n"}]
    domain = {**tree["data"], "sources": sources, "domain": "news"}
    tree["evaluation"]["domains"] = [domain]
    config.write_text(yaml.safe_dump(to_tree(resolve(from_tree(tree)))))
    (texts,), notes = scored("new.txt")
    assert set(texts) < set(paragraphs(7))
    assert not notes


def test_an_option_that_is_stated_is_used(folder, scored):
    """The user's cut is not the run's, so the text is looked for."""
    (texts,), _ = scored('{kind: files, path: c/a.txt, separator: "\\n"}')
    assert not set(texts) & trained_on(folder / "run")
    sources, domain = cut_as_known(
        parse_source_argument('{kind: files, path: c/a.txt, separator: "\\n"}'),
        [text.data for text in training_texts(folder / "run")],
    )
    assert sources[0]["separator"] == "\n"
    assert domain is None


# Unfinished runs


@pytest.fixture
def stopped(tmp_path: Path, make_tree, at) -> Callable[..., Path]:
    """Makes a run of 12 steps that stopped when the checkpoint of step 10 was there."""

    def stop(**parts: Any) -> Path:
        training = {"checkpoint_every": 5, **parts.pop("training", {})}
        config = from_tree(make_tree(tmp_path, training=training, **parts))

        def interrupt(trainer: Trainer) -> None:
            raise Interrupted(130)

        with pytest.raises(Interrupted):
            train(config, callbacks=[at(10, interrupt)])
        return tmp_path / "run"

    return stop


def validated(run: Path, step: int) -> float:
    """What the run measured itself, in nats per token."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    (line,) = [x for x in lines if (x["kind"], x["step"]) == ("validation", step)]
    return line["nats_per_token"]


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"tokenizer": {"kind": "bpe", "vocab_size": 300}},
        {"model": {"feed_forward": "kan-local"}, "training": {"grid_schedule": {0: 2, 4: 4}}},
        {"model": {"feed_forward": "kan-local"}, "training": {"grid_schedule": {0: 2, 10: 4}}},
        {"training": {"early_stopping_patience": 5}},
    ],
    ids=["plain", "learned tokenizer", "refined", "to be refined", "early stopping"],
)
def test_an_unfinished_run_is_measured_as_it_measured_itself(parts, stopped, capsys, monkeypatch):
    # Wide enough for the path in one line.
    monkeypatch.setenv("COLUMNS", "300")
    run = stopped(**parts)
    capsys.readouterr()
    results = evaluate_runs([run], [], ["evaluation.split=validation"])
    out, error = capsys.readouterr()
    name = f"{run} (step 10 of 12)"
    assert f"{run} is not finished: its newest checkpoint is read, step 10 of 12" in error
    assert name in out
    (record,) = results["records"]
    assert (record["arm"], record["step"]) == (name, 10)
    arm = results["arms"][name]
    assert (arm["steps"], arm["planned_steps"]) == (10, 12)
    assert 0.9 < arm["train_tokens"] / (10 * 4 * 16) <= 1
    assert record["nats"] / record["tokens"] == pytest.approx(validated(run, 10), rel=1e-6)
    assert generate(run, ["generation.temperature=0"]) == generate(
        run, ["generation.temperature=0"]
    )


def test_a_damaged_checkpoint_is_passed_over_and_that_is_said(stopped, capsys):
    run = stopped()
    (run / "checkpoints" / "step-00000010" / "model.safetensors").write_bytes(b"")
    results = evaluate_runs([run], [], ["evaluation.split=validation"])
    assert "step-00000010 is damaged" in capsys.readouterr().err
    (record,) = results["records"]
    assert record["arm"] == f"{run} (step 5 of 12)"
    assert record["nats"] / record["tokens"] == pytest.approx(validated(run, 5), rel=1e-6)


def test_a_checkpoint_of_several_processes_is_read_as_one(stopped):
    """Cut by hand into the rows of two ranks."""
    run = stopped()
    place = run / "checkpoints" / "step-00000010"
    whole = evaluate_runs([run], [], [])["records"]
    tensors = load_file(place / "model.safetensors")
    parts: list[dict[str, torch.Tensor]] = [{}, {}]
    layouts = {}
    for name, tensor in tensors.items():
        rows = len(tensor) if tensor.dim() else 1
        bounds = [0, rows // 2, rows] if rows > 1 else [0, 1]
        cuts = list(itertools.pairwise(bounds))
        for rank, (start, stop) in enumerate(cuts):
            parts[rank][name] = tensor[start:stop].clone() if tensor.dim() else tensor
        layouts[name] = {
            "shape": list(tensor.shape),
            "parts": [[rank, *cut] for rank, cut in enumerate(cuts)],
        }
    for rank, part in enumerate(parts):
        save_file(part, place / f"model-rank-{rank}.safetensors")
    (place / "shards.json").write_text(json.dumps({"model": layouts, "optimizer": {}}))
    for name in ("model.safetensors", "optimizer.safetensors", "index.json"):
        (place / name).unlink()
    write_checksums(place)
    assert evaluate_runs([run], [], [])["records"] == whole


def test_text_that_makes_another_tokenizer_is_refused(stopped, tmp_path):
    run = stopped(tokenizer={"kind": "bpe", "vocab_size": 300})
    with (tmp_path / "words.txt").open("a") as file:
        file.write("\n\n\nqueer zebras jump")
    with pytest.raises(UserError, match="makes another than it was trained with: bring that text"):
        generate(run, [])
