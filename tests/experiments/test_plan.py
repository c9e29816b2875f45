"""How the arms of a study are derived: whose cost they get, and what a list of layers becomes."""

import pytest

from kanlm.config import from_tree
from kanlm.errors import UserError
from kanlm.experiments import study
from kanlm.model.feed_forward import width_multiple
from kanlm.model.matching import feed_forward_cost, total_cost
from kanlm.training.resolve import resolve

TWINS = {"kan": {}, "gelu": {"model": {"feed_forward": "gelu"}}}
SINGLE = {"model": {"feed_forward": "kan-single"}}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("match", ["parameters", "flops"])
def test_an_arm_without_a_width_sets_the_cost_of_all(place, match, tmp_path, make_tree):
    """Wherever it stands, also for the first arm, whose width the file leaves open."""
    arms = [("kan", {}), ("kat", {"model": {"feed_forward": {"kind": "kat", "groups": 4}}})]
    arms.insert(place, ("single", SINGLE))
    tree = make_tree(tmp_path, model={"d_model": 64}, study={"arms": dict(arms), "match": match})
    config = resolve(from_tree(tree))
    planned = {arm.name: arm.config.model for arm in study.plan(config)}
    assert list(planned) == [name for name, _ in arms]
    costs = {name: total_cost(model, match) for name, model in planned.items()}
    for name in ("kan", "kat"):
        spec = planned[name].feed_forward_by_layer[0]
        wider = {**spec, "hidden": spec["hidden"] + width_multiple(spec)}
        unit = feed_forward_cost(wider, 64, match) - feed_forward_cost(spec, 64, match)
        assert abs(costs[name] - costs["single"]) <= max(0.01 * costs["single"], 2 * unit)
    alone = make_tree(tmp_path, model={"d_model": 64, "feed_forward": "kan-single"})
    assert total_cost(resolve(from_tree(alone)).model, match) == costs["single"]


def test_two_arms_without_a_width_must_cost_the_same(tmp_path, make_tree):
    smaller = {"model": {"feed_forward": {"kind": "kan-single", "basis": {"degree": 2}}}}
    arms = {**TWINS, "one": SINGLE, "two": smaller}
    config = resolve(from_tree(make_tree(tmp_path, study={"arms": arms})))
    with pytest.raises(UserError) as caught:
        study.plan(config)
    # 3 and 2 numbers on each of 16² edges, and 16 biases, in two layers.
    assert str(caught.value) == (
        "study.arms: several arms have no width to solve, and differ in parameters of their "
        "feed-forward blocks (one 1,568, two 1,056): keep one of them"
    )
    config = resolve(from_tree(make_tree(tmp_path, study={"arms": {**arms, "two": SINGLE}})))
    assert [arm.name for arm in study.plan(config)] == ["kan", "gelu", "one", "two"]


@pytest.mark.parametrize("shrink", [False, True])
def test_an_arm_may_be_a_hybrid(shrink, tmp_path, make_tree):
    layers = [{"kind": "gelu", "repeat": 4}, {"kind": "kan", "repeat": 2}]
    arms = {"swiglu": {}, "hybrid": {"model": {"feed_forward": layers}}}
    model = {"d_model": 64, "n_layers": 6, "feed_forward": "swiglu"}
    tree = make_tree(tmp_path, shrink=shrink, model=model, study={"arms": arms})
    first, hybrid = (arm.config.model for arm in study.plan(resolve(from_tree(tree))))
    kinds = [spec["kind"] for spec in hybrid.feed_forward_by_layer]
    assert kinds == (["gelu", "kan"] if shrink else ["gelu"] * 4 + ["kan"] * 2)
    costs = [total_cost(model, "parameters") for model in (first, hybrid)]
    assert costs[1] == pytest.approx(costs[0], rel=0.15 if shrink else 0.02)
