"""Bare words, kinds that replace and settings that merge."""

# One case a line, however long.
# ruff: noqa: E501

import pytest

from kanlm.config import (
    load,
    merge,
)

KAN = {"kind": "kan", "hidden": 8, "base": None, "basis": {"kind": "bspline", "degree": 2}}


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


def test_another_optimizer_keeps_the_settings_that_both_have(write):
    path = write("x.yaml", "optimizer: {learning_rate: 3e-3, weight_decay: 0.0}\n")
    for override in ("optimizer.kind=muon", "optimizer=muon"):
        settings = load(path, [override]).optimizer
        assert (settings.kind, settings.learning_rate, settings.weight_decay) == ("muon", 3e-3, 0.0)
