"""From what a user wrote to settings that state everything: kinds, nested blocks, shrinking."""

# One case a line, however long.
# ruff: noqa: E501

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from kanlm.config import from_tree, to_tree
from kanlm.errors import UserError
from kanlm.experiments.study import check_settings, plan
from kanlm.model.feed_forward import FEED_FORWARDS, FeedForward, make_feed_forward
from kanlm.model.matching import resolve_feed_forward, solve_hidden
from kanlm.training import run as runs
from kanlm.training.resolve import resolve


class Sum(FeedForward):
    """The sum of blocks of equal width, one of them optional."""

    def __init__(
        self,
        d_model: int,
        hidden: int,
        output_scale: float,
        *,
        experts: list[dict[str, Any]] = [{"kind": "gelu"}, {"kind": "kan"}],  # noqa: B006
        block: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(d_model, hidden, output_scale)
        specs = [*experts, *([] if block is None else [block])]
        self.blocks = nn.ModuleList(
            make_feed_forward({**spec, "hidden": hidden}, d_model, output_scale) for spec in specs
        )
        self.label = "sum"

    def forward(self, x: Tensor) -> Tensor:
        return sum((block(x) for block in self.blocks), x.new_zeros(()))

    @property
    def flops_per_token(self) -> int:
        return 2 * sum(p.numel() for p in self.parameters())


@pytest.fixture
def with_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FEED_FORWARDS, "sum", Sum)


def refusal(feed_forward: Any, n_layers: int = 4) -> str:
    model = {"feed_forward": feed_forward, "n_layers": n_layers}
    with pytest.raises(UserError) as caught:
        resolve(from_tree({"model": model}))
    return str(caught.value)


# Blocks within a block


@pytest.mark.usefixtures("with_sum")
def test_blocks_within_a_block_are_completed() -> None:
    experts = [{"kind": "kan-local", "basis": {"degree": 2}}, {"kind": "spline-mlp"}]
    spec = {"kind": "sum", "experts": experts, "block": {"kind": "kat", "groups": 6}}
    config = resolve(from_tree({"model": {"feed_forward": spec, "d_model": 96}}))
    resolved = config.model.feed_forward_by_layer[0]
    assert set(resolved) == {"kind", "hidden", "experts", "block"}
    first, second = resolved["experts"]
    assert set(first) == {"kind", "basis", "base", "start"}
    assert (first["basis"]["degree"], first["basis"]["grid_size"]) == (2, 6)
    assert (second["basis"]["degree"], second["basis"]["grid_size"]) == (3, 8)
    assert resolved["block"]["groups"] == 6
    # The width suits the blocks within, and a second time changes nothing.
    assert resolved["hidden"] % 6 == 0
    assert resolve(config) == config
    assert resolve_feed_forward(config.model) == config.model
    assert solve_hidden(spec, 96, parameters=8 * 96**2) == resolved["hidden"]


@pytest.mark.usefixtures("with_sum")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"experts": [{"kind": "gelu"}, {"kind": "kann"}]}, "model.feed_forward.experts.1.kind = 'kann' is unknown; did you mean 'kan'?"),
        ({"experts": [{"kind": "kan", "bass": None}]}, "unknown setting 'model.feed_forward.experts.0.bass'; did you mean 'basis'?"),
        ({"block": {"kind": "kan", "basis": {"degree": "two"}}}, 'model.feed_forward.block.basis.degree = "two": input should be a valid integer'),
        ({"block": {"kind": "gelu", "hidden": 4}}, "model.feed_forward.block.hidden = 4: the width is that of the block around it"),
        ({"experts": [{"kind": "kan-single"}]}, "model.feed_forward.experts.0.kind = 'kan-single' has no width, and the block around it sets one"),
        ({"experts": [{"kind": "sum", "experts": [{"kind": "kat", "groups": "x"}]}]}, 'model.feed_forward.experts.0.experts.0.groups = "x": input should be a valid integer'),
        ({"experts": [3]}, "model.feed_forward.experts.0 = 3: "),
    ],
)  # fmt: skip
def test_a_mistake_within_a_block_is_named_with_its_place(spec: dict, message: str) -> None:
    assert refusal({"kind": "sum", **spec}).startswith(message)


# Bases of every kind

WITH_BASIS = [
    kind for kind in FEED_FORWARDS if "basis" in resolve_feed_forward(
        from_tree({"model": {"feed_forward": kind}}).model
    ).feed_forward_by_layer[0]
]  # fmt: skip


def test_the_kinds_with_a_basis_are_those_that_learn_functions() -> None:
    assert set(FEED_FORWARDS) - set(WITH_BASIS) == {
        *("gelu", "relu2", "swiglu"),
        *("moe", "conv-kan"),  # whose inner blocks have one
    }


@pytest.mark.parametrize("kind", WITH_BASIS)
def test_options_of_every_kinds_basis_are_completed_and_checked(kind: str) -> None:
    place = "model.feed_forward.basis"
    bspline = {"kind": "bspline", "degree": "two"}
    assert refusal({"kind": kind, "basis": bspline}).startswith(f'{place}.degree = "two": ')
    typo = {"kind": "bspline", "grid_sise": 3}
    line = f"unknown setting '{place}.grid_sise'; did you mean 'grid_size'?"
    assert refusal({"kind": kind, "basis": typo}) == line
    spec = {"kind": kind, "basis": {"kind": "chebyshev"}}
    resolved = resolve(from_tree({"model": {"feed_forward": spec}})).model.feed_forward_by_layer[0]
    assert resolved["basis"] == {
        "kind": "chebyshev",
        "degree": 4,
        "constant": False,
        "half_width": 5 / 3,
        "outside": "squash",
    }


def test_a_basis_without_a_kind_is_the_kinds_own() -> None:
    for kind, basis, own in (
        ("kan-glu", {"degree": 3}, "hermite"),
        ("kat", {"numerator": 4}, "rational"),
        ("kan", {"degree": 2}, "hermite"),
        ("kan-local", {"degree": 2}, "bspline"),
    ):
        spec = {"kind": kind, "basis": basis}
        config = resolve(from_tree({"model": {"feed_forward": spec}}))
        resolved = config.model.feed_forward_by_layer[0]["basis"]
        assert resolved["kind"] == own
        assert basis.items() <= resolved.items()


def test_impossible_options_are_refused_in_a_line() -> None:
    single = {"kind": "kan-single", "hidden": 4}
    line = "model.feed_forward.hidden = 4: kind 'kan-single' has no width to set"
    assert refusal(single) == line
    assert refusal({"kind": "kat", "groups": 3}).startswith("model: groups = 3 does not divide")
    line = "unknown setting 'model.feed_forward.repeat'"
    assert refusal({"kind": "kan", "repeat": 4}).startswith(line)
    layers = [{"kind": "kan", "repeat": 2}, {"kind": "gelu", "repeat": 3}]
    assert refusal(layers, n_layers=6).startswith(
        "model: feed_forward lists 5 layers, and n_layers = 6"
    )


# Shrinking


def test_a_shrunk_hybrid_keeps_its_first_and_last_kind() -> None:
    layers = [{"kind": "swiglu", "hidden": 99, "repeat": 8}, {"kind": "kan", "repeat": 4}]
    config = resolve(from_tree({"shrink": True, "model": {"n_layers": 12, "feed_forward": layers}}))
    assert [spec["kind"] for spec in config.model.feed_forward_by_layer] == ["swiglu", "kan"]
    assert config.model.feed_forward_by_layer[0]["hidden"] < 99
    assert resolve(config) == config
    assert from_tree(to_tree(config)) == config


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_a_shrunk_mixture_goes_from_its_first_weights_to_its_last() -> None:
    sources = [
        {"kind": "stdlib-prose", "weight": {0: 1, 10: 3, 20: 2}},
        {"kind": "stdlib-code", "weight": {0: 0, 10: 1}},
        {"kind": "stdlib-code", "weight": 4},
    ]
    config = resolve(from_tree({"shrink": True, "data": {"sources": sources}}))
    assert config.data.weights == [{0: 1.0, 1: 2.0}, {0: 0.0, 1: 1.0}, {0: 4.0}]
    assert resolve(config) == config


@pytest.mark.parametrize(
    "feed_forward",
    [
        *("kan-glu", "kan-single", "spline-mlp", "kat", "lowrank-kan"),
        [{"kind": "swiglu", "repeat": 2}, {"kind": "kan-single", "repeat": 1}],
    ],
    ids=str,
)
def test_every_kind_trains_when_shrunk(
    feed_forward, tmp_path: Path, cache: Path, make_tree
) -> None:
    tree = make_tree(
        cache,
        shrink=True,
        output_dir=str(tmp_path / "run"),
        model={"n_layers": 3, "feed_forward": feed_forward},
    )
    outcome = runs.run(resolve(from_tree(tree)))
    assert outcome is not None
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert max(line["step"] for line in lines if line["kind"] == "train") == 2
    assert outcome.accounting.parameters["feed_forward"] > 0


@pytest.mark.parametrize("option", [{"top_k": "x"}, {"experts": 3}])
def test_experts_of_a_wrong_type_are_refused_when_shrunk_too(option: dict) -> None:
    tree = {"shrink": True, "model": {"feed_forward": {"kind": "moe", **option}}}
    with pytest.raises(UserError, match="input should be a valid"):
        resolve(from_tree(tree))


@pytest.mark.parametrize(
    ("steps", "warmup"), [(1, 0), (3, 0), (10, 1), (49, 4), (499, 49), (500, 50), (10**6, 50)]
)
def test_a_default_warm_up_follows_the_steps_and_is_stated(
    tmp_path: Path, make_tree, steps, warmup
):
    tree = make_tree(tmp_path, training={"steps": steps})
    del tree["schedule"]
    config = resolve(from_tree(tree))
    assert config.schedule.warmup_steps == warmup
    assert resolve(config) == config


@pytest.mark.parametrize("steps", [1, 3, 10, 49, 10**6])
def test_no_default_refuses_a_number_of_steps(steps: int):
    assert resolve(from_tree({"training": {"steps": steps}})).training.steps == steps


def test_a_warm_up_that_is_stated_is_kept_or_refused(tmp_path: Path, make_tree):
    tree = make_tree(tmp_path, training={"steps": 10}, schedule={"warmup_steps": 7})
    assert resolve(from_tree(tree)).schedule.warmup_steps == 7
    assert resolve(from_tree({**tree, "shrink": True})).schedule.warmup_steps == 1
    tree["schedule"]["warmup_steps"] = 11
    with pytest.raises(
        UserError, match=r"schedule\.warmup_steps = 11 is more than training\.steps"
    ):
        from_tree(tree)
    tree["schedule"]["warmup_steps"] = "auto"
    assert resolve(from_tree({**tree, "shrink": True})).schedule.warmup_steps == 0


def test_the_default_warm_up_of_a_stage_is_of_its_own_steps(tmp_path: Path, make_tree):
    """The study itself keeps it open, as there is no one number."""
    tree = make_tree(tmp_path, training={"steps": 1000}, study={"arms": {"a": {}}})
    del tree["schedule"]
    config = resolve(from_tree(tree))
    assert config.schedule.warmup_steps == "auto"
    stages = [{"data": {"domain": "more"}, "training": {"steps": 20}}]
    found = [
        [run.schedule.warmup_steps for run in check_settings(arm, stages)] for arm in plan(config)
    ]
    assert found == [[50, 2]]
