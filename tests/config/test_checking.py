"""What is unknown or of a wrong type is refused in one line that names it."""

# One case a line, however long.
# ruff: noqa: E501

from dataclasses import dataclass

import pytest

from kanlm.config import check_options, from_tree, parse_json
from kanlm.data.sources import check_source
from kanlm.errors import UserError


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
def test_an_unknown_key_is_refused_with_the_nearest_right_one(refusal, tree, path, right):
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
def test_an_unknown_kind_is_refused_with_the_nearest_right_one(refusal, tree, message):
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
def test_a_wrong_type_is_refused_with_setting_and_value(refusal, tree, beginning):
    line = refusal(tree)
    assert line.startswith(beginning)
    assert "dict[" not in line
    assert "list[" not in line


def test_a_registry_class_brings_its_own_options():
    class Kind:
        def __init__(self, width, *, knots: int = 3, ends: tuple[float, float] = (0.0, 1.0)):
            pass

    assert check_options(Kind, {"knots": 4}, "x") == {"knots": 4, "ends": [0.0, 1.0]}
    with pytest.raises(UserError, match=r"unknown setting 'x\.width'"):
        check_options(Kind, {"width": 4}, "x")
    with pytest.raises(UserError, match=r'x\.knots = "4": '):
        check_options(Kind, {"knots": "4"}, "x")


def test_sources_resolve_to_all_their_options():
    assert check_source({"kind": "files", "path": "x"}) == {
        "kind": "files",
        "weight": 1.0,
        "path": "x",
        "format": None,
        "column": None,
        "separator": None,
    }


def test_the_half_precision_that_is_none_here_is_refused_with_the_reason() -> None:
    with pytest.raises(
        UserError, match=r"training\.precision = \"fp16\".*'bf16'.*losses are scaled"
    ):
        from_tree({"training": {"precision": "fp16"}})


@dataclass(frozen=True)
class Inner:
    size: int


@dataclass(frozen=True)
class Outer:
    inner: Inner


@pytest.mark.parametrize(
    "text", ['{"inner": {"size": 3, "more": 1}}', '{"inner": {"size": "3"}}', '{"inner": {}}', "["]
)
def test_dataclasses_are_made_of_json_strictly_at_every_level(text: str):
    assert parse_json(Outer, b'{"inner": {"size": 3}}') == Outer(Inner(3))
    with pytest.raises(ValueError, match="Outer"):
        parse_json(Outer, text)
