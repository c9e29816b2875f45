"""How a configuration comes together from files and overrides, and what it refuses."""

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
    PenaltySettings,
    check_options,
    from_tree,
    load,
    merge,
    read_tree,
    to_tree,
    to_yaml,
)
from kanlm.data.sources import check_source
from kanlm.errors import UserError
from kanlm.kan.penalties import PENALTIES
from kanlm.training.resolve import resolve

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def refusal(tree: dict[str, Any]) -> str:
    """The line in which a tree is refused, by the dataclasses or by the registries."""
    with pytest.raises(UserError) as caught:
        resolve(from_tree(tree))
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


# Bases


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


# Overrides


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


# Kinds


def test_a_bare_word_is_a_kind_wherever_a_section_has_one(write):
    text = """
        tokenizer: bytes
        schedule: constant
        data: {sources: stdlib-code}
        model: {n_layers: 2, feed_forward: [kan, {kind: kan, basis: bspline}]}
        evaluation: {domains: [{domain: d, sources: [stdlib-prose, {kind: stdlib-code, weight: 2}]}]}
        study: {arms: {a: {model: {feed_forward: gelu}}}, stages: [{data: {sources: stdlib-code}}]}
    """
    config = load(write("x.yaml", text))
    assert (config.tokenizer.kind, config.schedule.kind) == ("bytes", "constant")
    assert config.data.sources == [{"kind": "stdlib-code"}]
    assert config.model.feed_forward == [
        {"kind": "kan"},
        {"kind": "kan", "basis": {"kind": "bspline"}},
    ]
    assert config.evaluation.domains[0].sources == [
        {"kind": "stdlib-prose"},
        {"kind": "stdlib-code", "weight": 2},
    ]
    assert config.study is not None
    assert config.study.arms == {"a": {"model": {"feed_forward": {"kind": "gelu"}}}}
    assert config.study.stages == [{"data": {"sources": [{"kind": "stdlib-code"}]}}]


KAN = {"kind": "kan", "hidden": 8, "base": None, "basis": {"kind": "bspline", "degree": 2}}


@pytest.mark.parametrize(
    ("upper", "expected"),
    [
        ("swiglu", {"kind": "swiglu"}),
        ({"kind": "swiglu", "hidden": 3}, {"kind": "swiglu", "hidden": 3}),
        ({"hidden": 9}, {**KAN, "hidden": 9}),
        ({"kind": "kan", "hidden": 9}, {**KAN, "hidden": 9}),
        ("kan", KAN),
        ({"basis": {"degree": 3}}, {**KAN, "basis": {"kind": "bspline", "degree": 3}}),
        ({"basis": "fourier"}, {**KAN, "basis": {"kind": "fourier"}}),
        (["gelu", "kan"], [{"kind": "gelu"}, {"kind": "kan"}]),
    ],
)
def test_naming_another_kind_replaces_the_section_and_the_same_kind_merges(upper, expected):
    merged = merge({"model": {"feed_forward": KAN}}, {"model": {"feed_forward": upper}})
    assert merged == {"model": {"feed_forward": expected}}


def test_lists_are_replaced_whole():
    merged = merge({"study": {"seeds": [0, 1, 2]}}, {"study": {"seeds": [5]}})
    assert merged == {"study": {"seeds": [5]}}


# Refusals


@pytest.mark.parametrize(
    ("tree", "path", "right"),
    [
        ({"sed": 1}, "sed", "seed"),
        ({"model": {"d_modl": 8}}, "model.d_modl", "d_model"),
        ({"study": {"arms": {"a": {}}, "sedes": [1]}}, "study.sedes", "seeds"),
        (
            {"evaluation": {"domains": [{"domain": "a"}, {"domian": "b"}]}},
            "evaluation.domains.1.domian",
            "domain",
        ),
        (
            {"model": {"feed_forward": {"kind": "kan", "hiden": 3}}},
            "model.feed_forward.hiden",
            "hidden",
        ),
        (
            {"model": {"n_layers": 2, "feed_forward": ["gelu", {"kind": "kan", "bases": 3}]}},
            "model.feed_forward.1.bases",
            "base",
        ),
        (
            {"model": {"feed_forward": {"kind": "kan", "basis": {"degre": 3}}}},
            "model.feed_forward.basis.degre",
            "degree",
        ),
        (
            {"data": {"sources": [{"kind": "files", "path": "x", "seperator": "y"}]}},
            "data.sources.0.files.seperator",
            "separator",
        ),
        (
            {"evaluation": {"domains": [{"sources": ["stdlib-code", {"kind": "hub", "nam": 1}]}]}},
            "evaluation.domains.0.sources.1.hub.nam",
            "name",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_right_one(tree, path, right):
    assert refusal(tree) == f"unknown setting '{path}'; did you mean '{right}'?"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model": {"feed_forward": "kann"}}, "model.feed_forward.kind = 'kann' is unknown; did you mean 'kan'?"),
        ({"model": {"feed_forward": {"kind": "kan", "basis": "bsplin"}}}, "model.feed_forward.basis.kind = 'bsplin' is unknown; did you mean 'bspline'?"),
        ({"data": {"sources": "stdlib-cod"}}, "data.sources.0: unknown kind 'stdlib-cod'; did you mean 'stdlib-code'?"),
        ({"schedule": "cosin"}, "schedule.kind = \"cosin\": input should be 'cosine', 'warmup-stable-decay' or 'constant'"),
    ],
)  # fmt: skip
def test_an_unknown_kind_is_refused_with_the_nearest_right_one(tree, message):
    assert refusal(tree) == message


@pytest.mark.parametrize(
    ("tree", "beginning"),
    [
        ({"training": {"steps": "ten"}}, 'training.steps = "ten": '),
        ({"training": {"steps": 1.5}}, "training.steps = 1.5: "),
        ({"training": {"steps": True}}, "training.steps = true: "),
        ({"optimizer": {"learning_rate": "1e-3"}}, 'optimizer.learning_rate = "1e-3": '),
        ({"optimizer": {"betas": [0.9, "x"]}}, 'optimizer.betas.1 = "x": '),
        ({"optimizer": {"betas": [0.9]}}, "setting 'optimizer.betas.1' is missing"),
        ({"data": "words.txt"}, 'data = "words.txt": '),
        ({"data": {"sources": [3]}}, "data.sources.0 = 3: "),
        ({"model": {"feed_forward": 3}}, "model.feed_forward = 3: "),
        ({"study": {"arms": ["kan"]}}, 'study.arms = ["kan"]: '),
        ({"model": {"feed_forward": {"kind": "kan", "hidden": "8"}}}, "model.feed_forward.hidden = '8': "),
        ({"data": {"sources": [{"kind": "files", "path": 3}]}}, "data.sources.0.files.path = 3: "),
        ({"data": {"sources": [{"kind": "files"}]}}, "setting 'data.sources.0.files.path' is missing"),
    ],
)  # fmt: skip
def test_a_wrong_type_is_refused_with_setting_and_value(tree, beginning):
    line = refusal(tree)
    assert line.startswith(beginning)
    assert "dict[" not in line
    assert "list[" not in line


@pytest.mark.parametrize(
    ("tree", "beginning"),
    [
        ({"model": {"d_model": 30, "n_heads": 4}}, "model: n_heads = 4 does not divide d_model = 30"),
        ({"model": {"d_model": 12, "n_heads": 4}}, "model: d_model / n_heads = 3 is odd"),
        ({"model": {"n_kv_heads": 3}}, "model: n_kv_heads = 3 does not divide n_heads = 4"),
        ({"model": {"feed_forward": ["kan"]}}, "model: feed_forward lists 1 layers, and n_layers = 4"),
        ({"model": {"rope_theta": -1.0}}, "model: rope_theta = -1.0: expected a positive number"),
        ({"model": {"norm_epsilon": 0.0}}, "model: norm_epsilon = 0.0: expected a positive number"),
        ({"evaluation": {"stride": 257}}, "evaluation.stride = 257 is longer than model.context_length = 256"),
        ({"schedule": {"warmup_steps": 1001}}, "schedule.warmup_steps = 1001 is more than training.steps = 1000"),
        ({"training": {"batch_size": 6, "micro_batch_size": 4}}, "training.micro_batch_size = 4 does not divide training.batch_size = 6"),
        ({"training": {"early_stopping_patience": 1, "evaluate_every": None}}, "training: early_stopping_patience needs evaluate_every"),
        ({"tokenizer": {"kind": "bpe"}}, "tokenizer: vocab_size belongs to kind bpe, and bpe needs it"),
        ({"tokenizer": {"kind": "bytes", "vocab_size": 300}}, "tokenizer: vocab_size belongs to kind bpe"),
        ({"tokenizer": {"kind": "pretrained"}}, "tokenizer: name belongs to kind pretrained"),
        ({"data": {"validation_fraction": 0.6, "test_fraction": 0.4}}, "data: test_fraction = 0.4 and validation_fraction = 0.6 leave nothing to train on"),
        ({"data": {"sources": []}}, "data: sources is empty"),
        ({"data": {"sources": [{"kind": "stdlib-code", "weight": 0}]}}, "data: weight = 0 of a source"),
        ({"data": {"domain": "a/b"}}, "data: domain = 'a/b'"),
        ({"study": {"arms": {}}}, "study: arms is empty"),
        ({"study": {"arms": {"a": {}}, "seeds": [1, 1]}}, "study: seeds = [1, 1]"),
        ({"study": {"arms": {"kan": {}}, "arm_grids": {"kann": {}}}}, "study: arm_grids names 'kann'; did you mean 'kan'?"),
        ({"study": {"arms": {"../up": {}}}}, "study: arm '../up'"),
        ({"training": {"steps": 0}}, "training: steps = 0: expected a positive number"),
        ({"optimizer": {"learning_rate": float("nan")}}, "optimizer: learning_rate = nan: expected a positive number"),
        ({"optimizer": {"learning_rate": float("inf")}}, "optimizer: learning_rate = inf: expected a positive number"),
        ({"optimizer": {"weight_decay": float("nan")}}, "optimizer: weight_decay = nan: expected 0 or more"),
        ({"optimizer": {"basis_learning_rate_ratio": 0.0}}, "optimizer: basis_learning_rate_ratio = 0.0: expected a positive number"),
        ({"optimizer": {"muon_learning_rate": 0.01}}, "optimizer: muon_learning_rate = 0.01 belongs to kind muon: kind = adamw"),
        ({"optimizer": {"muon_coefficients": True}}, "optimizer: muon_coefficients = True belongs to kind muon"),
        ({"penalties": {"l1": -1.0}}, "penalties: l1 = -1.0: expected 0 or more"),
        ({"penalties": {"l2": float("inf")}}, "penalties: l2 = inf: expected 0 or more"),
        ({"penalties": {"curvature": 0.1}}, "penalties: curvature of bspline1-g6: degree = 1 has no second derivative"),
        ({"penalties": {"smoothness": 0.1}, "model": {"feed_forward": {"kind": "kan", "basis": "chebyshev"}}}, "penalties: smoothness of chebyshev4: expected a basis whose functions stand in a row"),
        ({"penalties": {"l1": 0.1}, "model": {"feed_forward": "gelu"}}, "penalties: the model has no KAN layer"),
        ({"training": {"polish_steps": -1}}, "training: polish_steps = -1: expected 0 or more"),
        ({"training": {"polish_batch_size": 16}}, "training: polish_batch_size = 16 needs polish_steps above 0"),
        ({"training": {"polish_steps": 5, "polish_batch_size": 24}}, "training: polish_batch_size = 24: expected a multiple of batch_size = 16"),
        ({"training": {"polish_steps": 5, "early_stopping_patience": 2}}, "training: polish_steps = 5: early stopping keeps the best model"),
        ({"training": {"polish_steps": 5}, "model": {"feed_forward": "gelu"}}, "training.polish_steps = 5: the model has no KAN layer"),
        ({"seed": -1}, "seed = -1: expected"),
        ({"seed": 2**32}, "seed = 4294967296: expected"),
        ({"study": {"arms": {"a": {}}, "seeds": [0, -1]}}, "study: seeds = [0, -1]: expected"),
    ],
)  # fmt: skip
def test_an_impossible_combination_is_refused(tree, beginning):
    assert refusal(tree).startswith(beginning)


def test_every_penalty_has_a_weight_and_none_is_taken_by_default():
    assert list(asdict(PenaltySettings())) == list(PENALTIES)
    assert PenaltySettings().weights == {}
    assert PenaltySettings(l1=0.5, curvature=2.0).weights == {"l1": 0.5, "curvature": 2.0}


def test_penalties_and_polish_are_kept_where_they_can_act():
    basis = {"kind": "bspline", "degree": 3}
    tree = {
        "model": {"feed_forward": {"kind": "kan", "basis": basis}},
        "penalties": {"curvature": 0.1, "smoothness": 0.1},
        "training": {"polish_steps": 5, "polish_batch_size": 32},
    }
    config = resolve(from_tree(tree))
    assert config.penalties.curvature == 0.1
    assert (config.training.polish_steps, config.training.polish_batch_size) == (5, 32)
    shrunk = resolve(from_tree({**tree, "shrink": True}))
    assert (shrunk.training.polish_steps, shrunk.training.polish_batch_size) == (2, None)


def test_another_optimizer_keeps_the_settings_that_both_have(write):
    path = write("x.yaml", "optimizer: {learning_rate: 3e-3, weight_decay: 0.0}\n")
    for override in ("optimizer.kind=muon", "optimizer=muon"):
        settings = load(path, [override]).optimizer
        assert (settings.kind, settings.learning_rate, settings.weight_decay) == ("muon", 3e-3, 0.0)


def test_a_registry_class_brings_its_own_options():
    class Kind:
        def __init__(self, width, *, knots: int = 3, ends: tuple[float, float] = (0.0, 1.0)):
            pass

    assert check_options(Kind, {"knots": 4}, "x") == {"knots": 4, "ends": [0.0, 1.0]}
    with pytest.raises(UserError, match=r"unknown setting 'x\.width'"):
        check_options(Kind, {"width": 4}, "x")
    with pytest.raises(UserError, match=r'x\.knots = "4": '):
        check_options(Kind, {"knots": "4"}, "x")


# Printing and reading again

#: OmegaConf reads `${` as a reference and ??? as a value still to come.
texts = st.text(max_size=12).filter(lambda text: "${" not in text and text != "???")
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
            | st.just({"arms": {"a": part}, "stages": [part], "grid": {"seed": [1, None, "x"]}})
        ),
    }  # fmt: skip


@given(trees())
@settings(max_examples=60, deadline=None)
def test_printed_settings_read_back_as_the_same_config(tmp_path_factory, tree):
    config = from_tree(tree)
    path = tmp_path_factory.getbasetemp() / "printed.yaml"
    path.write_text(to_yaml(config))
    assert load(path) == config
    assert from_tree(to_tree(config)) == config


@given(trees(), trees())
@settings(max_examples=30, deadline=None)
def test_laying_a_whole_config_over_another_gives_the_upper_one(lower, upper):
    lower, upper = (to_tree(from_tree(tree)) for tree in (lower, upper))
    # Arms and grids are dictionaries with any keys, which add up.
    lower["study"] = upper["study"]
    assert from_tree(merge(lower, upper)) == from_tree(upper)


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


def test_sources_resolve_to_all_their_options():
    assert check_source({"kind": "files", "path": "x"}) == {
        "kind": "files",
        "weight": 1.0,
        "path": "x",
        "column": "text",
        "separator": None,
    }


def test_reading_a_config_imports_no_torch(write):
    path = write("x.yaml", "tokenizer: bytes\n")
    program = (
        "import sys; from kanlm.config import load, to_yaml; "
        f"to_yaml(load({str(path)!r}, ['model.d_model=64'])); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
