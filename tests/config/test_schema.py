"""Impossible combinations are refused, and possible ones kept."""

# One case a line, however long.
# ruff: noqa: E501

from dataclasses import asdict

import pytest

from kanlm.config import Config, PenaltySettings, TrainingSettings, from_tree, nested
from kanlm.errors import UserError
from kanlm.kan.penalties import PENALTIES
from kanlm.training.resolve import resolve


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
        ({"evaluation": {"domains": [{"domain": "a"}]}}, "evaluation: domains.0.sources is missing"),
        ({"study": {"arms": {"a": {}}, "stages": [{"data": {"domain": "b"}}]}}, "study: stages.0.data.sources is missing"),
        ({"data": {"sources": [{"kind": "stdlib-code", "weight": 0}]}}, "data: sources.0.weight = 0: expected a positive number, or a schedule"),
        ({"data": {"sources": [{"kind": "stdlib-code", "weight": float("inf")}]}}, "data: sources.0.weight = inf: expected a positive number"),
        ({"data": {"sources": ["stdlib-prose", {"kind": "stdlib-code", "weight": {5: 1}}]}}, "data: sources.1.weight = {'5': 1}: expected an entry for step 0"),
        ({"data": {"sources": [{"kind": "stdlib-code", "weight": {0: 1, 1000: 2}}]}}, "data.sources.0.weight = {0: 1.0, 1000: 2.0}: it changes before update 1000, and there are updates 0 to 999"),
        ({"data": {"domain": "a/b"}}, "data: domain = 'a/b'"),
        ({"study": {"arms": {}}}, "study: arms is empty"),
        ({"study": {"arms": {"a": {}}, "seeds": [1, 1]}}, "study: seeds = [1, 1]"),
        ({"study": {"arms": {"kan": {}}, "arm_grids": {"kann": {}}}}, "study: arm_grids names 'kann'; did you mean 'kan'?"),
        ({"study": {"arms": {"../up": {}}}}, "study: arm '../up'"),
        ({"study": {"arms": {"a": {}}, "grid": {"optimizer.learning_rate": []}}}, "study: grid[optimizer.learning_rate] = []: expected at least one value"),
        ({"study": {"arms": {"a": {}}, "grid": {"optimizer.learning_rate": [1, 1.0]}}}, "study: grid[optimizer.learning_rate] = [1, 1.0]: expected at least one value, none twice"),
        ({"study": {"arms": {"a": {}}, "arm_grids": {"a": {"model.dropout": []}}}}, "study: arm_grids.a[model.dropout] = []: expected"),
        ({"study": {"arms": {"a": {}}, "grid": {"seed": [1, 2]}}}, "study: grid sets seed = 1, which a study sets for each of its runs: give study.seeds instead"),
        ({"study": {"arms": {"a": {"seed": 3}}}}, "study: arms.a sets seed = 3, which a study sets for each of its runs: give study.seeds instead"),
        ({"study": {"arms": {"a": {"output_dir": "x"}}}}, "study: arms.a sets output_dir = x, which a study sets for each of its runs: leave it out"),
        ({"study": {"arms": {"a": {}}, "stages": [{"seed": 3}]}}, "study: stages.0 sets seed = 3, which"),
        ({"training": {"steps": 0}}, "training.steps = 0: input should be greater than 0"),
        ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate = NaN: input should be a finite number"),
        ({"optimizer": {"learning_rate": float("inf")}}, "optimizer.learning_rate = Infinity: input should be a finite number"),
        ({"optimizer": {"weight_decay": float("nan")}}, "optimizer.weight_decay = NaN: input should be a finite number"),
        ({"optimizer": {"basis_learning_rate_ratio": 0.0}}, "optimizer.basis_learning_rate_ratio = 0.0: input should be greater than 0"),
        ({"optimizer": {"muon_learning_rate": 0.01}}, "optimizer: muon_learning_rate = 0.01 belongs to kind muon: kind = adamw"),
        ({"optimizer": {"muon_coefficients": True}}, "optimizer: muon_coefficients = True belongs to kind muon"),
        ({"penalties": {"l1": -1.0}}, "penalties.l1 = -1.0: input should be greater than or equal to 0"),
        ({"penalties": {"l2": float("inf")}}, "penalties.l2 = Infinity: input should be a finite number"),
        ({"penalties": {"curvature": 0.1}, "model": {"feed_forward": "kan-local"}}, "penalties: curvature of bspline1-g6: degree = 1 has no second derivative"),
        ({"penalties": {"smoothness": 0.1}, "model": {"feed_forward": {"kind": "kan", "basis": "chebyshev"}}}, "penalties: smoothness of chebyshev4: expected a basis whose functions stand in a row"),
        ({"penalties": {"l1": 0.1}, "model": {"feed_forward": "gelu"}}, "penalties: the model has no KAN layer"),
        ({"training": {"polish_steps": -1}}, "training.polish_steps = -1: input should be greater than or equal to 0"),
        ({"training": {"polish_batch_size": 16}}, "training: polish_batch_size = 16 needs polish_steps above 0"),
        ({"training": {"polish_steps": 5, "polish_batch_size": 24}}, "training: polish_batch_size = 24: expected a multiple of batch_size = 16"),
        ({"training": {"polish_steps": 5, "early_stopping_patience": 2}}, "training: polish_steps = 5: early stopping keeps the best model"),
        ({"training": {"polish_steps": 5}, "model": {"feed_forward": "gelu"}}, "training.polish_steps = 5: the model has no KAN layer"),
        ({"seed": -1}, "seed = -1: input should be greater than or equal to 0"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "optimizer.betas.1 = 1.0: input should be less than 1"),
        ({"schedule": {"warmup_steps": -1}}, "schedule.warmup_steps = -1: input should be greater than or equal to 0"),
        ({"schedule": {"final_ratio": 1.5}}, "schedule.final_ratio = 1.5: input should be less than or equal to 1"),
        ({"training": {"grid_schedule": {0: 0}}}, "training.grid_schedule.0 = 0: input should be greater than 0"),
        ({"tokenizer": {"kind": "bpe", "vocab_size": 256}}, "tokenizer.vocab_size = 256: input should be greater than or equal to 257"),
        ({"seed": 2**32}, "seed = 4294967296: input should be less than 4294967296"),
        ({"study": {"arms": {"a": {}}, "seeds": [0, -1]}}, "study.seeds.1 = -1: input should be greater than or equal to 0"),
    ],
)  # fmt: skip
def test_an_impossible_combination_is_refused(refusal, tree, beginning):
    assert refusal(tree).startswith(beginning)


UNLIKE = {
    "training.steps": 12,
    "training.batch_size": 8,
    "training.evaluate_every": 5,
    "training.early_stopping_patience": 2,
    "model.context_length": 64,
    "tokenizer.kind": "bytes",
    "data.domain": "other",
    "evaluation.stride": 16,
    "shrink": True,
}


@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize("place", ["arms", "grid", "arm_grids", "section"])
def test_arms_must_see_the_same_tokens(refusal, place, name):
    value = UNLIKE[name]
    study, where = {
        "arms": ({"arms": {"a": {}, "x": nested(name, value)}}, "arms.x"),
        "grid": ({"arms": {"a": {}}, "grid": {name: [value]}}, "grid"),
        "arm_grids": ({"arms": {"a": {}}, "arm_grids": {"a": {name: [value]}}}, "arm_grids.a"),
        "section": (
            {
                "arms": {"a": {}},
                "grid": {head: [part] for head, part in nested(name, value).items()},
            },
            "grid",
        ),
    }[place]
    line = refusal({"study": study})
    assert line.startswith(f"study: {where} sets {name} = {value}: every arm trains on identical")
    assert "arms may differ in model, optimizer, schedule, penalties and training, but not" in line


def test_arms_may_differ_in_what_changes_no_batch():
    arm = {
        "model": {"feed_forward": "kan-local", "d_model": 64, "dropout": 0.1, "qk_norm": True},
        "training": {"compile": "off", "grid_schedule": {0: 4}, "polish_steps": 2},
        "optimizer": {"kind": "muon", "learning_rate": 1e-3},
        "schedule": {"kind": "constant", "warmup_steps": 1},
        "penalties": {"l1": 0.1},
    }
    grid = {"optimizer.learning_rate": [1e-3, 3e-3], "model.dropout": [0.0, 0.1]}
    study = from_tree({"study": {"arms": {"a": {}, "b": arm}, "grid": grid}}).study
    assert study is not None
    assert list(study.grid) == list(grid)


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


def test_a_configuration_made_in_python_is_checked_where_it_is_resolved():
    for config, said in (
        (Config(training=TrainingSettings(steps=0)), "training.steps = 0: input should be greater"),
        (Config(seed="one"), 'seed = "one": input should be a valid integer'),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(UserError, match=said):
            resolve(config)
