"""How a configuration comes together from files and overrides, and is written again."""

# One case a line, however long.
# ruff: noqa: E501

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kanlm.config import (
    Config,
    from_tree,
    load,
    merge,
    read_tree,
    to_tree,
    to_yaml,
)
from kanlm.config.safe_yaml import read_yaml, write_yaml
from kanlm.errors import UserError
from kanlm.training.resolve import resolve

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


KAN = {"kind": "kan", "hidden": 8, "base": None, "basis": {"kind": "bspline", "degree": 2}}


def test_a_base_lies_below_the_file_that_names_it_and_is_found_beside_it(write):
    write("deep/er/one.yaml", "seed: 1\ntraining: {steps: 70, batch_size: 2}\n")
    write("deep/two.yaml", "base: er/one.yaml\ntraining: {steps: 80, log_every: 5}\n")
    top = write("three.yaml", "base: deep/two.yaml\ntraining: {log_every: 6}\n")
    config = load(top)
    assert config.seed == 1
    assert (config.training.steps, config.training.batch_size) == (80, 2)
    assert config.training.log_every == 6


def test_an_absolute_base_is_read_from_where_it_says(write):
    base = write("elsewhere/base.yaml", "seed: 4\n")
    assert load(write("top.yaml", f"base: {base}\n")).seed == 4


def test_bases_in_a_loop_are_refused(write):
    write("b.yaml", "base: c.yaml\n")
    write("c.yaml", "base: a.yaml\n")
    with pytest.raises(UserError, match=r"a\.yaml: `base:` leads back to the same file"):
        load(write("a.yaml", "base: b.yaml\n"))


def test_a_base_used_twice_is_no_loop(write):
    write("base.yaml", "seed: 3\n")
    write("middle.yaml", "base: base.yaml\n")
    assert load(write("top.yaml", "base: middle.yaml\n")).seed == 3


def test_each_file_is_read_once(write, monkeypatch):
    base = write("base.yaml", "seed: 3\n")
    top = write("top.yaml", "base: base.yaml\n")
    read: list[Path] = []
    read_text = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path, **options: [read.append(path), read_text(path, **options)][1],
    )
    load(top, ["seed=4", "training.steps=9"])
    assert read == [top, base]


def test_a_missing_base_is_named(write):
    with pytest.raises(UserError, match=r"gone\.yaml: no such config file"):
        load(write("top.yaml", "base: gone.yaml\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "expected a mapping of settings at the top"),
        ("seed: [1\n", "cannot be read as YAML: .*line 2"),
        ("seed: 1\nseed: 2\n", "cannot be read as YAML: found duplicate key seed.*line 2"),
    ],
)
def test_what_is_no_config_file_is_refused_in_a_line(write, text, message):
    with pytest.raises(UserError, match=rf"x\.yaml: {message}") as caught:
        load(write("x.yaml", text))
    assert "\n" not in str(caught.value)


def test_undecodable_bytes_in_a_config_are_refused(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"seed: \xff\n")
    with pytest.raises(UserError, match=r"x\.yaml: cannot be read as YAML: .*0xff in position 6"):
        load(tmp_path / "x.yaml")


def test_an_empty_file_is_all_defaults(write):
    assert load(write("x.yaml", "")) == Config()


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.learning_rate=1e-3", 1e-3),
        ("optimizer.betas=[0.8, 0.9]", (0.8, 0.9)),
        ("training.micro_batch_size=null", None),
        ("training.micro_batch_size=", None),
        ("generation.prompt=a=b", "a=b"),
        ("generation.prompt='a: b '", "a: b "),
        ("model.qk_norm=true", True),
        ("training.compile=off", "off"),
        ("training.compile=on", "on"),
        ("output_dir=2024-01-01", "2024-01-01"),
        ("study.seeds=[3,4]", [3, 4]),
        ("study.grid[optimizer.learning_rate]=[1e-3,3e-3]", {"optimizer.learning_rate": [1e-3, 3e-3]}),
    ],
)  # fmt: skip
def test_an_override_is_yaml_at_a_dotted_name(write, override, value):
    config: Any = load(write("x.yaml", "study: {arms: {one: {}}}\n"), [override])
    for part in override.partition("=")[0].partition("[")[0].split("."):
        config = getattr(config, part)
    assert config == value


def test_the_last_override_wins_over_earlier_ones_and_the_file(write):
    path = write("x.yaml", "seed: 1\n")
    assert load(path, ["seed=2", "training.steps=60", "seed=3"]).seed == 3


@pytest.mark.parametrize("override", ["seed", "=3", "a.=3", ".a=3", "seed=[", "seed={a"])
def test_what_is_no_override_is_refused_by_name(write, override):
    with pytest.raises(UserError) as caught:
        load(write("x.yaml", ""), [override])
    assert str(caught.value).startswith(f"override '{override}': ")
    assert "\n" not in str(caught.value)


def test_on_and_off_mean_themselves_in_a_file(write):
    # YAML 1.1 takes both words for booleans.
    assert load(write("x.yaml", "training: {compile: off}\n")).training.compile == "off"


def test_a_printed_config_states_every_setting(write):
    printed = yaml.safe_load(to_yaml(load(write("x.yaml", "training: {steps: 60}\n"))))
    assert set(printed) == set(asdict(Config()))
    assert set(printed["training"]) == set(asdict(Config().training))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_resolve_and_read_back_resolved(path, tmp_path):
    if "initialize_from" in read_tree(path, []):
        pytest.skip("inherits a run's model")
    config = resolve(load(path))
    (tmp_path / "printed.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "printed.yaml") == config
    assert resolve(config) == config


def test_reading_a_config_imports_no_torch(write):
    path = write("x.yaml", "tokenizer: bytes\n")
    program = (
        "import sys; from kanlm.config import load, to_yaml; "
        f"to_yaml(load({str(path)!r}, ['model.d_model=64'])); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


texts = st.text(max_size=12) | st.sampled_from(["${x}", "${", "???"])
positive = st.floats(min_value=1e-30, max_value=1e30)


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of every type: text, numbers, nulls, lists, kinds and nested partial configs."""
    part = {"optimizer": {"learning_rate": draw(positive)}, "generation": {"prompt": draw(texts)}}
    return {
        "seed": draw(st.integers(0, 2**32 - 1)),
        "data": {
            "near_duplicate_threshold": draw(st.none() | st.floats(0.01, 1)),
            "sources": draw(st.lists(st.fixed_dictionaries({"kind": texts}), min_size=1)),
        },
        "tokenizer": draw(
            st.sampled_from(["bytes", "characters", {"kind": "bpe", "vocab_size": 300}])
        ),
        "model": {"feed_forward": draw(st.sampled_from(["gelu", KAN])), "qk_norm": draw(st.booleans())},
        "training": {"compile": draw(st.sampled_from(["on", "off", "auto"]))},
        "optimizer": {"betas": draw(st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)))},
        "generation": {"prompt": draw(texts)},
        "study": draw(
            st.none()
            | st.just({"arms": {"a": part}, "stages": [{**part, "data": {"sources": "a"}}], "grid": {"generation.prompt": [1, None, "x"]}})
        ),
    }  # fmt: skip


@given(trees())
@settings(max_examples=60)
def test_printed_settings_read_back_as_the_same_config(tmp_path_factory, tree):
    config = from_tree(tree)
    path = tmp_path_factory.getbasetemp() / "printed.yaml"
    path.write_text(to_yaml(config))
    assert load(path) == config
    assert from_tree(to_tree(config)) == config


@pytest.mark.parametrize("text", ["\x85", "\u2028", " \u2029", "\n", "a\r\nb", "\ufeff", "\t", "1"])
def test_line_breaks_of_every_kind_are_printed_so_that_they_read_back(text):
    printed = write_yaml({"prompt": text})
    assert read_yaml(printed) == {"prompt": text}
    assert len(printed.splitlines()) == 1


@given(trees(), trees())
@settings(max_examples=30)
def test_laying_a_whole_config_over_another_gives_the_upper_one(lower, upper):
    lower, upper = (to_tree(from_tree(tree)) for tree in (lower, upper))
    # Arms and grids are dictionaries with any keys, which add up.
    lower["study"] = upper["study"]
    assert from_tree(merge(lower, upper)) == from_tree(upper)
