"""A file from somebody else runs nothing, reads nothing else and takes no time."""

import math
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kanlm.config import load, parse_override
from kanlm.config.safe_yaml import read_yaml, write_yaml
from kanlm.errors import UserError

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)

CHAIN = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 60))
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: !!python/object/apply:os.system ['touch canary']", "no value for a setting"),
        ("seed: !!python/name:os.system", "no value for a setting"),
        ("seed: !!binary aGk=", "no value for a setting"),
        ("output_dir: !!timestamp 2001-01-01", "no value for a setting"),
        ("model: {d_model: 1, d_model: 2}", "found duplicate key d_model in line 1"),
        ("output_dir: ${oc.env:HOME}", "'${' in line 1"),
        ("model: &a {feed_forward: *a}", "an alias of itself"),
        (CHAIN, "more than 50 levels"),
        (MERGES, "more than 50000 values"),
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


def test_text_that_looks_like_interpolation_is_text_where_it_is_quoted(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("generation: {prompt: '${x}'}")
    assert load(path).generation.prompt == "${x}"
    assert load(path, ["generation.prompt='${y}'"]).generation.prompt == "${y}"
    with pytest.raises(UserError, match=r"prompt=\$\{y\}': '\$\{' .* not replaced by anything"):
        load(path, ["generation.prompt=${y}"])


def test_a_file_starts_no_program_and_the_command_line_may(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("study: {launcher: touch canary, arms: {a: {}}}")
    with pytest.raises(UserError, match=r"study\.launcher is a command, .* command line alone"):
        load(path)
    path.write_text("study: {arms: {a: {}}}")
    study = load(path, ["study.launcher=torchrun --nproc_per_node 2"]).study
    assert study is not None
    assert study.launcher == "torchrun --nproc_per_node 2"


#: Plain scalars with their values by the core schema of YAML 1.2.2, section 10.3.2.
CORE = {
    "010": 10,
    "-010": -10,
    "08": 8,
    "+12": 12,
    "0o10": 8,
    "0x1F": 31,
    "0b11": "0b11",
    "1_000": "1_000",
    "1:30": "1:30",
    "190:20:30": "190:20:30",
    "1e3": 1000.0,
    "1.5e-3": 0.0015,
    ".5": 0.5,
    "5.": 5.0,
    "-.inf": -math.inf,
    "0.1_0": "0.1_0",
    "true": True,
    "False": False,
    "yes": "yes",
    "No": "No",
    "on": "on",
    "off": "off",
    "y": "y",
    "null": None,
    "~": None,
    "2001-01-01": "2001-01-01",
    "=": "=",
}


@pytest.mark.parametrize(("text", "value"), CORE.items())
def test_plain_scalars_are_those_of_yaml_1_2(text, value):
    assert read_yaml(f"a: {text}") == {"a": value}
    assert type(read_yaml(f"a: {text}")["a"]) is type(value)
    if text != "=":
        assert parse_override(f"a={text}") == {"a": value}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=1_000", 'seed = "1_000": input should be a valid integer'),
        ("training.time_limit_minutes=1:30", 'time_limit_minutes = "1:30": input should be'),
        ("model.qk_norm=yes", 'qk_norm = "yes": input should be a valid boolean'),
        ("training.compile=true", "compile = true: input should be 'off', 'on'"),
    ],
)
def test_what_another_reader_would_convert_is_refused(tmp_path, override, said):
    (tmp_path / "a.yaml").touch()
    with pytest.raises(UserError) as caught:
        load(tmp_path / "a.yaml", [override])
    assert said in str(caught.value)


def test_leading_zeros_count_for_nothing(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 010")
    assert load(tmp_path / "a.yaml").seed == 10
    assert load(tmp_path / "a.yaml", ["seed=0010"]).seed == 10


@given(
    st.text()
    | st.sampled_from([*CORE, "${a}"])
    | st.from_regex(r"[-+0-9a-foxn.:_~]{1,6}", fullmatch=True)
)
def test_written_text_is_text_to_readers_of_either_version(text):
    assert read_yaml(write_yaml({"a": text})) == {"a": text}
    assert yaml.safe_load(write_yaml({"a": text})) == {"a": text}


@given(st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none())
def test_written_values_are_the_same_to_readers_of_either_version(value):
    for found in (read_yaml(write_yaml({"a": value})), yaml.safe_load(write_yaml({"a": value}))):
        assert found == {"a": value}
        assert type(found["a"]) is type(value)
