"""A file from somebody else runs nothing, reads nothing else and takes no time."""

import time
from pathlib import Path

import pytest

from kanlm.config import load
from kanlm.errors import UserError

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: !!python/object/apply:os.system ['touch canary']", "no value for a setting"),
        ("seed: !!python/name:os.system", "no value for a setting"),
        ("seed: !!binary aGk=", "no value for a setting"),
        ("output_dir: 2001-01-01", "no value for a setting"),
        ("output_dir: ${oc.env:HOME}", "'${' in line 1"),
        ("model: &a {feed_forward: *a}", "an alias of itself"),
        (BOMB, "more than 50000 values"),
        ("seed: " + "[" * 60 + "]" * 60, "more than 50 levels"),
        ("seed: " + "[" * 100_000, "more than 50 levels"),
        ("# " + "x" * 2**20, "characters, expected at most"),
    ],
    ids=lambda value: value[:40],
)
def test_what_no_setting_is_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    started = time.monotonic()
    with pytest.raises(UserError, match="cannot be read as YAML: ") as caught:
        load("config.yaml")
    assert said in str(caught.value)
    assert time.monotonic() - started < 5
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_aliases_and_merges_that_stand_for_little_are_taken(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "optimizer: &o {learning_rate: 0.5}\n"
        "study: {arms: {a: {}, b: {optimizer: {<<: *o, epsilon: 1.0e-6}}}}\n"
    )
    study = load(path).study
    assert study is not None
    assert study.arms["b"]["optimizer"] == {"learning_rate": 0.5, "epsilon": 1e-6}


def test_a_file_starts_no_program_and_the_command_line_may(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("study: {launcher: touch canary, arms: {a: {}}}")
    with pytest.raises(UserError, match=r"study\.launcher is a command, .* command line alone"):
        load(path)
    path.write_text("study: {arms: {a: {}}}")
    study = load(path, ["study.launcher=torchrun --nproc_per_node 2"]).study
    assert study is not None
    assert study.launcher == "torchrun --nproc_per_node 2"
