"""The command line: what each verb does, and how each kind of bad input ends."""

import errno
import json
import os
import pkgutil
import runpy
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from kanlm.cli import main
from kanlm.config import from_tree, load, merge
from kanlm.errors import UserError
from kanlm.training.resolve import resolve
from kanlm.training.run_folder import check_free, lock_folder

VERBS = [
    ["pretrain"],
    ["finetune"],
    ["evaluate"],
    ["compare"],
    ["continual"],
    ["generate"],
    ["plan"],
    ["data"],
    ["data", "describe"],
    ["data", "prepare"],
    ["runs"],
    ["settings"],
]
CONFIG_VERBS = ("pretrain", "finetune", "compare", "continual", "plan")


@pytest.fixture
def write(tmp_path: Path, make_tree) -> Callable[..., Path]:
    """Writes the config of a tiny run with the given parts laid over it."""

    def write(name: str = "config.yaml", **parts: Any) -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(make_tree(tmp_path, **parts)))
        return path

    return write


@pytest.fixture
def runs(tmp_path: Path, finished_runs: Path) -> Path:
    """A copy of the finished runs."""
    return Path(shutil.copytree(finished_runs, tmp_path / "finished"))


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, apart from the cache of prepared text."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if "cache" not in path.relative_to(folder).parts
    }


@pytest.fixture
def refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Calls the command, which must end with code 2 and one line, and leave nothing behind."""

    def refuse(*words: str | Path) -> str:
        before = contents(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        error = capsys.readouterr().err
        assert caught.value.code == 2, error
        assert error.startswith("kanlm")
        assert error.count("\n") == 1, error
        assert error.endswith("\n")
        assert contents(tmp_path) == before
        return error

    return refuse


def call(*words: str | Path) -> None:
    main([str(word) for word in words])


# Help and settings


def test_help_imports_nothing_heavy():
    """Which is what makes it answer at once, on any machine."""
    questions = [["--version"], *([*verb, "--help"] for verb in ([], *VERBS))]
    program = (
        "import sys; from kanlm.cli import main\n"
        f"for words in {questions}:\n"
        "    try: main(words)\n"
        "    except SystemExit as stop: assert not stop.code\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'rich'}\n"
        "    assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    for verb in ([], *VERBS):
        assert f"usage: {' '.join(['kanlm', *verb])} " in done.stdout


def test_mistakes_that_need_no_torch_are_told_without_it(runs, write, tmp_path):
    """Which takes seconds to import."""
    (tmp_path / "bad.yaml").write_text("seed: [")
    (tmp_path / "text.yaml").write_text("seed: 1")
    base = runs / "kan"
    stopped = Path(shutil.copytree(runs / "gelu", tmp_path / "stopped"))
    for name in ("model", "checkpoints"):
        shutil.rmtree(stopped / name)
    config, gone = write(), "data.sources=[{kind: files, path: gone.txt}]"
    mistakes = {
        "nope is no run folder": [["generate", "nope"], ["evaluate", "nope"]],
        "stopped has no model/ yet and no checkpoint": [
            ["generate", stopped],
            ["evaluate", stopped],
        ],
        "did you mean 'temperature'?": [["generate", base, "generation.temprature=1"]],
        "reads only": [
            ["evaluate", base, "training.steps=2"],
            ["generate", base, "model.d_model=8"],
        ],
        "source 'nope': no such file": [
            ["evaluate", base, "--data", "nope"],
            ["pretrain", config, "--data", "nope"],
        ],
        "nope.yaml: no such config file": [[verb, "nope.yaml"] for verb in CONFIG_VERBS],
        "nope: no such folder": [["runs", "nope"]],
        "cannot be read as YAML": [
            ["pretrain", tmp_path / "bad.yaml"],
            ["plan", tmp_path / "bad.yaml"],
        ],
        "did you mean 'steps'?": [
            [verb, config, "training.stps=3"]
            for verb in ("pretrain", "compare", "continual", "plan")
        ],
        "expected section.key=value": [["pretrain", config, ".=3"]],
        "training.steps = ": [["pretrain", config, "training.steps=many"]],
        "gone is no run folder": [["finetune", config, "initialize_from=gone"]],
        "initialize_from is missing": [["finetune", config]],
        "initialize_from belongs to": [["pretrain", config, f"initialize_from={base}"]],
        "no such file in": [["pretrain", config, gone], ["data", "describe", config, gone]],
        "unknown kind 'file'": [["pretrain", config, "data.sources=[{kind: file}]"]],
        "data.sources is missing": [["pretrain", tmp_path / "text.yaml"]],
        "both name the text": [["pretrain", config, "--data", "stdlib-prose", gone]],
        "invalid choice: 'pretain'": [["pretain", config]],
        "unrecognized argument --date": [["pretrain", config, "--date=1"]],
    }
    cases = [
        (message, [str(word) for word in words])
        for message, commands in mistakes.items()
        for words in commands
    ]
    program = (
        "import sys, io, contextlib; from kanlm.cli import main\n"
        f"for message, words in {cases!r}:\n"
        "    error = io.StringIO()\n"
        "    try:\n"
        "        with contextlib.redirect_stderr(error): main(words)\n"
        "    except SystemExit as stop: code = stop.code\n"
        "    else: code = 0\n"
        "    assert code == 2 and message in error.getvalue(), (words, code, error.getvalue())\n"
        "    assert error.getvalue().count('\\n') == 1, error.getvalue()\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)\n"
        "    assert not heavy, (words, heavy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr


def test_a_checkout_that_is_not_installed_runs():
    """With the dependencies alone: the version is then read from the checkout."""
    program = (
        "import importlib.metadata as metadata, runpy, sys\n"
        "def missing(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = missing\n"
        "sys.argv = ['kanlm', '--version']\n"
        "runpy.run_module('kanlm', run_name='__main__')"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert (done.returncode, done.stdout) == (0, f"kanlm {project['version']}\n"), done.stderr


def test_help_fits_80_columns():
    environment = {**os.environ, "COLUMNS": "80"}
    program = (
        "from kanlm.cli import main\n"
        f"for words in {[[*verb, '--help'] for verb in ([], *VERBS)]}:\n"
        "    try: main(words)\n"
        "    except SystemExit: pass"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
    )
    assert max(map(len, done.stdout.splitlines())) <= 80


STUDY = {"arms": {"kan": {}, "gelu": {"model": {"feed_forward": "gelu"}}}}
STAGES = [{"data": {"domain": "more", "sources": [{"kind": "stdlib-code"}]}}]


@pytest.mark.parametrize(
    ("verb", "study"),
    [
        (["pretrain"], None),
        (["compare"], STUDY),
        (["continual"], {**STUDY, "stages": STAGES}),
        (["data", "describe"], None),
        (["data", "prepare"], None),
    ],
    ids=str,
)
def test_printed_settings_load_as_the_resolved_config(verb, study, write, tmp_path, capsys):
    path = write(study=study)
    call(*verb, path, "--print-config", "seed=5")
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load(printed) == resolve(load(path, ["seed=5"]))
    assert not (tmp_path / "run").exists()


def test_printed_settings_of_finetune_hold_what_it_inherits(write, runs, tmp_path, capsys):
    path = tmp_path / "tune.yaml"
    path.write_text(f"initialize_from: {runs / 'kan'}\noutput_dir: {tmp_path / 'tuned'}\n")
    call("finetune", "--print-config", path, "training.steps=60")
    config = from_tree(yaml.safe_load(capsys.readouterr().out))
    assert config.model == load(runs / "kan" / "config.yaml").model
    assert config.tokenizer.kind == "bytes"
    assert config.training.steps == 60


@pytest.mark.parametrize(
    ("verb", "override"),
    [("evaluate", "evaluation.stride=4"), ("generate", "generation.top_k=4")],
)
def test_printed_settings_of_a_run_are_the_runs(verb, override, runs, capsys):
    call(verb, runs / "kan", "--print-config", override)
    config = from_tree(yaml.safe_load(capsys.readouterr().out))
    assert config == load(runs / "kan" / "config.yaml", [override])


def test_printed_settings_of_several_runs_are_several_documents(runs, capsys):
    call("evaluate", runs / "kan", runs / "gelu", "--print-config")
    documents = yaml.safe_load_all(capsys.readouterr().out)
    kinds = [from_tree(tree).model.feed_forward_by_layer[0]["kind"] for tree in documents]
    assert kinds == ["kan", "gelu"]


@pytest.mark.parametrize(
    "order",
    [
        ["CONFIG", "--print-config", "seed=3", "training.steps=40"],
        ["CONFIG", "seed=3", "--print-config", "training.steps=40"],
        ["--print-config", "seed=3", "CONFIG", "training.steps=40"],
        ["seed=3", "training.steps=40", "CONFIG", "--print-config"],
    ],
    ids=" ".join,
)
def test_options_files_and_overrides_come_in_any_order(order, write, capsys):
    path = str(write())
    call("pretrain", *[path if word == "CONFIG" else word for word in order])
    config = from_tree(yaml.safe_load(capsys.readouterr().out))
    assert (config.seed, config.training.steps) == (3, 40)


def test_a_path_may_hold_an_equals_sign(write, capsys):
    call("pretrain", "seed=2", write("lr=3.yaml"), "--print-config")
    assert from_tree(yaml.safe_load(capsys.readouterr().out)).seed == 2


# What the verbs do


def test_python_dash_m_is_the_same_door(write, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kanlm", "pretrain", str(write()), "training.steps=4"])
    runpy.run_module("kanlm", run_name="__main__")
    printed = capsys.readouterr().out
    for name in ("model", "results.json", "report.html"):
        assert (tmp_path / "run" / name).exists()
        assert str(tmp_path / "run" / name) in printed.splitlines()


def test_a_finished_run_is_left_as_it_is(runs, capsys):
    before = contents(runs)
    call("pretrain", runs / "kan" / "config.yaml", f"output_dir={runs / 'kan'}")
    after = contents(runs)
    assert {k: v for k, v in after.items() if not k.endswith("report.html")} == {
        k: v for k, v in before.items() if not k.endswith("report.html")
    }


def test_finetune_goes_on_from_a_run(write, runs, make_text, tmp_path):
    (tmp_path / "more.txt").write_text(make_text(["def", "return", "(", ")", ":", "x", "y"]))
    tree = yaml.safe_load(write().read_text())
    del tree["model"], tree["tokenizer"]
    source = [{"kind": "files", "path": str(tmp_path / "more.txt"), "separator": "\n\n\n"}]
    tree = merge(tree, {"data": {"domain": "code", "sources": source}})
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(tree))
    call("finetune", tmp_path / "tune.yaml", f"initialize_from={runs / 'kan'}")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["domains"] == ["code"]
    assert load(tmp_path / "run" / "config.yaml").initialize_from == str(runs / "kan")


def test_pretrain_on_ones_own_text_by_one_option(write, make_text, tmp_path, capsys, monkeypatch):
    """As if data.sources named it, whatever the config's text and root are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text(make_text(["def", "return", "x", "y"]))
    (tmp_path / "more.jsonl").write_text('{"text": "a"}\n')
    path = write(data={"root": "elsewhere", "sources": [{"kind": "files", "path": "gone"}]})
    call("pretrain", path, "--data", "mine.txt", "--print-config")
    data = from_tree(yaml.safe_load(capsys.readouterr().out)).data
    assert (data.domain, data.root) == ("mine", ".")
    (source,) = data.sources
    assert (source["kind"], source["path"]) == ("files", str(tmp_path / "mine.txt"))
    words = ["--data", "mine.txt", "--data", "more.jsonl", "--data", "stdlib-code"]
    for verb in (["pretrain"], ["data", "describe"], ["plan"]):
        call(*verb, path, *words, "--print-config")
        data = from_tree(yaml.safe_load(capsys.readouterr().out)).data
        assert data.domain == "mine+more+stdlib-code"
        assert [source["weight"] for source in data.sources] == [1.0, 1.0, 1.0]
    call("pretrain", path, *words, "data.domain=all", "--print-config")
    assert from_tree(yaml.safe_load(capsys.readouterr().out)).data.domain == "all"
    call("pretrain", path, "--data", "mine.txt", "training.steps=2")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["domains"] == ["mine"]


def test_evaluate_puts_runs_side_by_side_as_they_measured_themselves(runs, capsys, monkeypatch):
    call("evaluate", runs / "kan", "--json", runs / "gelu")
    results = json.loads(capsys.readouterr().out)
    assert list(results["arms"]) == [str(runs / "kan"), str(runs / "gelu")]
    for name, arm in results["arms"].items():
        (own,) = json.loads((Path(name) / "results.json").read_text())["arms"].values()
        assert arm["bits_per_byte"] == own["bits_per_byte"]
        assert arm["bits_per_byte_interval"] == own["bits_per_byte_interval"]
        assert arm["parameters"] == own["parameters"]
    (record, other) = results["records"]
    assert (record["split"], other["domain"]) == ("test", "words")
    monkeypatch.setenv("COLUMNS", "200")
    call("evaluate", runs / "kan", runs / "gelu")
    table = capsys.readouterr().out
    for name, arm in results["arms"].items():
        (row,) = [line for line in table.splitlines() if name in line]
        assert f"{arm['bits_per_byte'][0][0]:.3f}" in row


def test_evaluate_reads_another_text_with_another_stride(runs, tmp_path, capsys):
    (tmp_path / "other.jsonl").write_text(
        "".join(json.dumps({"text": f"a dog {i} in no house"}) + "\n" for i in range(60))
    )
    call("evaluate", "--data", tmp_path / "other.jsonl", runs / "kan", "--json")
    coarse = json.loads(capsys.readouterr().out)
    stride = "evaluation.stride=2"
    call("evaluate", runs / "kan", "--data", tmp_path / "other.jsonl", stride, "--json")
    fine = json.loads(capsys.readouterr().out)
    (one,), (two,) = coarse["records"], fine["records"]
    assert (one["tokens"], one["bytes"]) == (two["tokens"], two["bytes"])
    assert one["nats"] != two["nats"]


def test_evaluate_holds_out_of_a_trained_text_what_the_run_held_out(runs, capsys):
    """Read as one document it would be cut in order, through what the run has learned."""
    own = yaml.safe_load((runs / "kan" / "config.yaml").read_text())["data"]["sources"][0]["path"]
    bits = []
    for data in ([], ["--data", own]):
        call("evaluate", runs / "kan", *data, "--json")
        bits.append(json.loads(capsys.readouterr().out)["records"][0])
    assert bits[0]["nats"] == bits[1]["nats"]


def test_evaluate_refuses_runs_that_hold_out_different_shares(runs, tmp_path, capsys):
    config = runs / "gelu" / "config.yaml"
    tree = yaml.safe_load(config.read_text())
    tree["data"]["test_fraction"] = 0.05
    config.write_text(yaml.safe_dump(tree))
    with pytest.raises(SystemExit) as caught:
        call("evaluate", runs / "kan", runs / "gelu")
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert "(0.1, 0.05) and (0.1, 0.1)" in error
    cure = ["data.validation_fraction=0.1", "data.test_fraction=0.05"]
    assert error.endswith(" ".join(cure) + "\n")
    call("evaluate", runs / "kan", runs / "gelu", *cure, "--json")
    one, two = json.loads(capsys.readouterr().out)["records"]
    assert one["bytes"] == two["bytes"]


def test_generate_continues_the_prompt(runs, capsys):
    texts = []
    for seed in (2, 2, 3):
        words = ["generation.prompt='the dog '", "generation.max_new_tokens=20", f"seed={seed}"]
        call("generate", runs / "kan", *words)
        texts.append(capsys.readouterr().out)
        assert texts[-1].startswith("the dog ")
        assert len(texts[-1]) > len("the dog \n")
    assert texts[0] == texts[1] != texts[2]


def test_data_describe_and_prepare(write, tmp_path, capsys):
    call("data", "prepare", write())
    (folder,) = (tmp_path / "cache").glob("words-*")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["counts"]["train"]["documents"] > 30
    capsys.readouterr()
    call("data", "describe", tmp_path / "config.yaml")
    printed = capsys.readouterr().out
    assert "domain words, 257 tokens in the vocabulary" in printed
    assert str(manifest["content_hash"])[:8] in printed


# Bad input


@pytest.mark.parametrize("verb", [["pretrain"], ["compare"], ["data", "describe"]], ids=" ".join)
def test_an_unknown_key(verb, write, refuse):
    line = refuse(*verb, write(), "model.d_modl=8")
    assert line == "kanlm: unknown setting 'model.d_modl'; did you mean 'd_model'?\n"


def test_a_wrong_type(write, refuse):
    line = refuse("pretrain", write(), "training.steps=many")
    assert line.startswith('kanlm: training.steps = "many": ')


def test_heads_that_do_not_divide_the_width(write, refuse):
    line = refuse("pretrain", write(), "model.n_heads=3")
    assert line == "kanlm: model: n_heads = 3 does not divide d_model = 16\n"


def test_a_context_longer_than_the_data(write, refuse):
    line = refuse("pretrain", write(), "model.context_length=100000")
    assert "model.context_length = 100000: longer than the" in line


def test_a_split_without_documents(write, refuse):
    line = refuse("pretrain", write(), "data.test_fraction=0")
    assert "no document falls into test with data.test_fraction = 0" in line


@pytest.mark.parametrize("verb", [("pretrain",), ("data", "describe"), ("data", "prepare")])
def test_a_config_without_text_is_refused_and_told_what_to_write(verb, tmp_path, refuse):
    (tmp_path / "empty.yaml").touch()
    output = f"output_dir={tmp_path / 'run'}"
    line = refuse(*verb, tmp_path / "empty.yaml", output, f"data.cache_dir={tmp_path / 'cache'}")
    assert "data.sources is missing: name the text, for example data.sources=stdlib-prose" in line


def test_a_vocabulary_smaller_than_the_tokenizers(write, refuse):
    line = refuse("pretrain", write(), "model.vocab_size=100")
    assert line == "kanlm: model.vocab_size = 100 is less than the tokenizer's 257\n"


def test_a_tokenizer_that_is_not_the_base_runs(write, runs, refuse):
    path = write(initialize_from=str(runs / "kan"), tokenizer="characters")
    line = refuse("finetune", path, "model.dropout=0.0")
    assert "tokenizer.kind = characters differs from bytes in" in line


@pytest.mark.parametrize(
    ("words", "beginning"),
    [
        (["pretrain", "gone.yaml"], "kanlm: gone.yaml: no such config file"),
        (["evaluate", "gone"], "kanlm: gone is no run folder"),
        (["generate", "gone"], "kanlm: gone is no run folder"),
        (["generate", "gone", "--print-config"], "kanlm: gone is no run folder"),
        (["evaluate", "seed=3"], "kanlm: expected at least one path, found none"),
        (["pretrain", "a", "b"], "kanlm: expected one path, found a b"),
        (["pretrain", "seed=3"], "kanlm: expected one path, found none"),
        (["pretrain"], "kanlm pretrain: the following arguments are required: CONFIG"),
        (["pretrain", "a.yaml", "--dry-run"], "kanlm: unrecognized argument --dry-run"),
        (["pretran", "a.yaml"], "kanlm: argument VERB: invalid choice: 'pretran'"),
        ([], "kanlm: the following arguments are required: VERB"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_missing_or_superfluous_word(words, beginning, refuse):
    assert refuse(*words).startswith(beginning)


@pytest.mark.parametrize(
    ("verb", "overrides", "read"),
    [
        ("generate", ["model.d_model=64", "evaluation.stride=4"], "generation, seed\n"),
        (
            "evaluate",
            ["model.d_model=64", "seed=3", "generation.top_k=3", "evaluation.domains=[]"],
            "data, model.context_length, evaluation.split, evaluation.stride, "
            "evaluation.batch_size, evaluation.bootstrap_resamples\n",
        ),
    ],
)
def test_an_override_that_would_go_unread(verb, overrides, read, tmp_path, make_tree, refuse):
    """Before a model is looked for."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(make_tree(tmp_path)))
    for override in overrides:
        line = refuse(verb, run, override)
        assert line == (
            f"kanlm: override '{override}': of a run's settings `kanlm {verb}` reads only {read}"
        )
        assert refuse(verb, run, override, "--print-config") == line
    assert "unknown setting 'model.d_modl'" in refuse(verb, run, "model.d_modl=3")


@pytest.mark.parametrize("setting", ["domain=mine", "sources=[stdlib-code]", "root=/"])
@pytest.mark.parametrize("more", [[], ["--print-config"], ["--json"]], ids=str)
def test_a_text_that_is_given_leaves_none_to_set(setting, more, runs, refuse, tmp_path):
    (tmp_path / "other.txt").write_text("a dog in no house")
    words = [runs / "kan", f"data.{setting}", "--data", tmp_path / "other.txt", *more]
    line = refuse("evaluate", *words)
    assert line.startswith(
        f"kanlm: override 'data.{setting}': of a run's settings `kanlm evaluate --data` reads "
        "only data.cache_dir, "
    )


def test_another_text_may_be_set_by_its_parts(runs, tmp_path, capsys):
    """Where none is given, these are read."""
    (tmp_path / "other.jsonl").write_text(
        "".join(json.dumps({"text": f"a dog {i} in no house"}) + "\n" for i in range(60))
    )
    call("evaluate", runs / "kan", "--data", tmp_path / "other.jsonl", "--json")
    given = json.loads(capsys.readouterr().out)
    source = "data.sources=[{kind: files, path: other.jsonl}]"
    words = [source, f"data.root={tmp_path}", "data.domain=dogs"]
    call("evaluate", runs / "kan", *words, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["domains"] == ["dogs"]
    assert found["records"][0]["nats"] == given["records"][0]["nats"]


def test_a_missing_data_file(write, refuse, tmp_path):
    path = write(data={"sources": [{"kind": "files", "path": "gone.txt"}], "root": str(tmp_path)})
    assert f"path = 'gone.txt': no such file in {tmp_path}" in refuse("pretrain", path)


def test_a_base_run_that_is_missing_or_unfinished(write, runs, refuse):
    assert "gone is no run folder" in refuse("finetune", write(), "initialize_from=gone")
    assert "initialize_from is missing" in refuse("finetune", write())
    shutil.rmtree(runs / "kan" / "model")
    path = write(initialize_from=str(runs / "kan"), model={"dropout": 0.0})
    assert f"{runs / 'kan'} has no model/ yet: finish that run first" in refuse("finetune", path)
    shutil.rmtree(runs / "kan" / "checkpoints")
    line = f"{runs / 'kan'} has no model/ yet and no checkpoint, of which the first comes after st"
    for verb in ("generate", "evaluate"):
        assert line in refuse(verb, runs / "kan")


def test_a_source_to_evaluate_on_that_is_missing(runs, refuse):
    line = refuse("evaluate", runs / "kan", "--data", "stdlib-cod")
    assert "source 'stdlib-cod': no such file, and no kind; did you mean 'stdlib-code'?" in line


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n\n \n", "holds no text"),
        ("latin.txt", b"caf\xe9", "latin.txt: not UTF-8: byte 3 is 0xe9"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "bad.jsonl, line 2: malformed JSON"),
        ("no.jsonl", b'{"txt": "a"}\n', "no column 'text' in 1 row; did you mean 'txt'?"),
    ],
)
@pytest.mark.parametrize("verb", [["pretrain"], ["data", "describe"]], ids=" ".join)
def test_text_that_cannot_be_read(verb, name, content, message, write, refuse, tmp_path):
    (tmp_path / name).write_bytes(content)
    path = write(data={"sources": [{"kind": "files", "path": str(tmp_path / name)}]})
    assert message in refuse(*verb, path)


def test_a_shard_that_does_not_match_its_manifest(write, refuse, tmp_path):
    path = write()
    call("data", "prepare", path)
    (shard,) = (tmp_path / "cache").glob("words-*/train-*.tokens.npy")
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    line = refuse("pretrain", path)
    assert f"{shard}: does not match the manifest's checksum; delete the folder" in line


def test_checkpoints_of_another_architecture(write, runs, refuse, tmp_path):
    path = write()
    call("pretrain", path, "training.steps=4", f"output_dir={tmp_path / 'other'}")
    for name in ("results.json", "model"):
        place = tmp_path / "other" / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    shutil.rmtree(tmp_path / "other" / "checkpoints")
    (runs / "gelu" / "checkpoints").rename(tmp_path / "other" / "checkpoints")
    line = refuse("pretrain", path, "training.steps=4", f"output_dir={tmp_path / 'other'}")
    assert "is of another architecture: " in line
    assert "in this model" in line


@pytest.mark.parametrize("verb", ["evaluate", "generate", "finetune"])
def test_a_model_whose_weights_are_of_another_architecture(verb, write, runs, refuse):
    weights = runs / "kan" / "model" / "model.safetensors"
    (weights.parent / "index.json").unlink()
    shutil.copy(runs / "gelu" / "model" / "model.safetensors", weights)
    place = runs / "kan"
    if verb == "finetune":
        place = write(initialize_from=str(place), model={"dropout": 0.0})
    assert f"{weights} is of another architecture: " in refuse(verb, place)


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"model_type": "gpt2"}'])
def test_a_model_that_is_none_of_ours(damage, runs, refuse):
    (runs / "kan" / "model" / "config.json").write_bytes(damage)
    assert str(runs / "kan" / "model") in refuse("generate", runs / "kan")


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"\xff" + content,
        lambda content: b'{"a":' * 100_000,
        lambda content: content.replace(b'"parameters": ', b'"parameters": -'),
        lambda content: content.replace(b'"bits_per_byte": [', b'"bits_per_byte": [NaN, '),
    ],
)
def test_results_of_a_run_that_are_damaged(damage, runs, refuse):
    path = runs / "kan" / "results.json"
    path.write_bytes(damage(path.read_bytes()))
    assert str(path) in refuse("evaluate", runs / "kan")
    (runs / "kan" / "report.html").unlink()
    config = runs / "kan" / "config.yaml"
    assert str(path) in refuse("pretrain", config, f"output_dir={runs / 'kan'}")


def test_a_run_folder_that_holds_another_config(write, runs, refuse):
    words = [f"output_dir={runs / 'kan'}", "optimizer.learning_rate=0.5"]
    line = refuse("pretrain", runs / "kan" / "config.yaml", *words)
    assert f"output_dir = {runs / 'kan'} holds a run with optimizer.learning_rate = 0.006" in line
    assert "not 0.5; choose another output_dir, or delete that folder" in line


def test_an_output_folder_that_holds_something_else(write, refuse, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("I")
    line = refuse("pretrain", write(), f"output_dir={tmp_path / 'thesis'}")
    assert "thesis exists and holds no run; choose another" in line
    line = refuse("pretrain", write(), f"output_dir={tmp_path / 'thesis' / 'chapter.txt'}")
    assert "chapter.txt exists and holds no run; choose another" in line


def test_an_output_folder_that_cannot_be_written(write, refuse, tmp_path):
    (tmp_path / "file").write_text("")
    line = refuse("pretrain", write(), f"output_dir={tmp_path / 'file' / 'run'}")
    assert "cannot be written: " in line


def test_a_cache_folder_that_cannot_be_written(write, refuse, tmp_path):
    (tmp_path / "file").write_text("")
    line = refuse("pretrain", write(data={"cache_dir": str(tmp_path / "file" / "cache")}))
    assert "data.cache_dir = " in line
    assert "cannot be written: Not a directory" in line


def test_no_room_for_a_checkpoint(write, refuse, tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = write()
    monkeypatch.setattr("kanlm.training.checkpointing.tensors.save_file", full)
    with pytest.raises(SystemExit) as caught:
        call("pretrain", path)
    assert caught.value.code == 2
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_no_room_for_metrics(write, tmp_path, monkeypatch, capsys):
    """/dev/full takes nothing, as a full disk does; started again with room, the run finishes."""
    monkeypatch.setattr("kanlm.training.tracking.write_text", lambda path, text: None)
    path = write()
    run = tmp_path / "run"
    run.mkdir()
    call("pretrain", path, "--print-config")
    (run / "config.yaml").write_text(capsys.readouterr().out)
    (run / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as caught:
        call("pretrain", path)
    assert caught.value.code == 2
    line = f"kanlm: {run / 'metrics.jsonl'} cannot be written: no space is left on the disk\n"
    assert capsys.readouterr().err == line
    (run / "metrics.jsonl").unlink()
    monkeypatch.undo()
    call("pretrain", path)
    assert (run / "results.json").exists()


@pytest.fixture
def small_disk(tmp_path: Path):
    """Mounts a file system of a given size, where that is allowed."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        return place

    yield mount
    if shutil.which("umount"):
        subprocess.run(["umount", str(place)], capture_output=True)


@pytest.mark.parametrize("size", ["8k", "64k", "256k"])
def test_no_room_on_a_real_disk(size, write, small_disk, capsys):
    disk = small_disk(size)
    with pytest.raises(SystemExit) as caught:
        call("pretrain", write(), f"output_dir={disk / 'run'}")
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no space is left on the disk" in error
    assert not list(disk.rglob("*.draft*"))


def test_no_room_for_shards(write, small_disk, capsys):
    disk = small_disk("8k")
    with pytest.raises(SystemExit) as caught:
        call("data", "prepare", write(data={"cache_dir": str(disk / "cache")}))
    assert caught.value.code == 2
    assert "no space is left on the disk" in capsys.readouterr().err
    assert not list(disk.rglob("*.npy"))


def test_no_network_for_a_hub_dataset(write, refuse, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    line = refuse("pretrain", write(data={"sources": [{"kind": "hub", "name": "some/data"}]}))
    assert "hub dataset 'some/data': no network" in line
    assert "offline, use stdlib-prose" in line


def test_no_network_for_a_pretrained_tokenizer(write, refuse, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = write(tokenizer={"kind": "pretrained", "name": "some/tokenizer"})
    line = refuse("pretrain", path)
    assert "tokenizer.name = 'some/tokenizer': cannot be loaded" in line
    assert "without network give a folder" in line


def test_a_folder_in_use_is_refused_at_once(write, tmp_path):
    """Before anything heavy is imported, for runs and studies alike."""
    path = write(study={**STUDY, "stages": STAGES})
    tuning = write("tuning.yaml", initialize_from=str(tmp_path / "base"))
    commands = [["pretrain", path], ["compare", path], ["continual", path], ["finetune", tuning]]
    program = (
        "import sys; from kanlm.cli import main\n"
        f"for words in {[[verb, str(path)] for verb, path in commands]}:\n"
        "    try: main(words)\n"
        "    except SystemExit as stop: assert stop.code == 2\n"
        "assert 'torch' not in sys.modules"
    )
    with lock_folder(tmp_path / "run"):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(commands)
    for line in lines:
        assert f"is in use by process {os.getpid()} on " in line


def test_results_and_report_are_written_under_the_lock(write, tmp_path, monkeypatch):
    """Of a run, of a finished run that gets its report again, and of a study."""
    found: list[str] = []
    for where in ("single", "compare"):
        name = f"kanlm.experiments.{where}.write_report"
        write_report = pkgutil.resolve_name(name)

        def watched(folder: Path, write_report=write_report) -> Path:
            with pytest.raises(UserError, match="in use by"):
                check_free(folder)
            found.append(folder.name)
            return write_report(folder)

        monkeypatch.setattr(name, watched)
    call("pretrain", write())
    call("pretrain", write())
    study = {"arms": {"kan": {}}}
    call("compare", write(output_dir=str(tmp_path / "study"), study=study))
    assert found == ["run", "run", "study"]


def test_a_mistake_that_all_processes_find_is_told_by_the_first(write, monkeypatch, capsys):
    """As torchrun starts them; of those on another machine again the first."""
    path = write(model={"d_modl": 3})
    for rank, told in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        for words in (["pretrain", path], ["pretrain"], ["pretrain", path, "--no-such"]):
            with pytest.raises(SystemExit) as caught:
                call(*words)
            assert caught.value.code == 2
            assert capsys.readouterr().err.count("\n") == told


# Interruption


def start(path: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kanlm", "pretrain", str(path), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_saves_and_the_same_command_goes_on_bit_for_bit(write, tmp_path):
    long = {"training": {"steps": 300, "evaluate_every": None, "checkpoint_every": None}}
    path = write(**long)
    process = start(path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error == "kanlm: stopped and saved; rerun the same command to resume\n"
    assert "Traceback" not in output
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert 0 < int(checkpoint.name.removeprefix("step-")) < 300
    assert not (tmp_path / "run" / "model").exists()

    call("pretrain", path)
    call("pretrain", path, f"output_dir={tmp_path / 'whole'}")
    ours, theirs = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole")
    )
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]
)
@pytest.mark.parametrize("verb", ["pretrain", "compare"])
def test_a_signal_before_training_says_how_to_go_on(number, code, verb, write, monkeypatch, capsys):
    before = signal.getsignal(number)
    where = "training.run" if verb == "pretrain" else "experiments.study"
    monkeypatch.setattr(f"kanlm.{where}.open_corpus", lambda *_, **__: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as caught:
        call(verb, write(study=STUDY))
    assert caught.value.code == code
    error = capsys.readouterr().err
    assert error == "kanlm: stopped; rerun the same command to resume from the last checkpoint\n"
    assert signal.getsignal(number) == before


def test_a_signal_to_one_process_of_several_is_left_to_end_it(write, monkeypatch):
    """Where it waits for the others it would not come to raise anything."""
    found = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(
        "kanlm.cli._pretrain", lambda _: found.append(signal.getsignal(signal.SIGTERM))
    )
    call("pretrain", write())
    assert found == [signal.SIG_DFL]
