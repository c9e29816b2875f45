"""A run that gets another length equals one that had it from the start, or is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kanlm.config import Config, ScheduleSettings, TrainingSettings, from_tree
from kanlm.errors import Interrupted, UserError
from kanlm.experiments.single import train
from kanlm.training import run_folder
from kanlm.training.length import why_not
from kanlm.training.run_folder import read_config_tree
from kanlm.training.schedule import learning_rate_ratio
from kanlm.training.trainer import Trainer

Make = Callable[..., Config]


@pytest.fixture
def make(tmp_path: Path, make_tree) -> Make:
    """Makes the settings of a run of so many steps at a constant rate."""

    def make(steps: int, name: str = "run", **parts: Any) -> Config:
        training = {"steps": steps, **parts.pop("training", {})}
        schedule = {"kind": "constant", "warmup_steps": 2, **parts.pop("schedule", {})}
        place = str(tmp_path / name)
        tree = make_tree(tmp_path, output_dir=place, training=training, schedule=schedule, **parts)
        return from_tree(tree)

    return make


@pytest.fixture
def stop_at(at) -> Callable[[int, Config], None]:
    """Trains up to the checkpoint of a step, and no further."""

    def interrupt(trainer: Trainer) -> None:
        raise Interrupted(130)

    def stop_at(step: int, config: Config) -> None:
        with pytest.raises(Interrupted):
            train(config, callbacks=[at(step, interrupt)])

    return stop_at


def outcome(config: Config) -> tuple[bytes, Any]:
    """The weights, and what was measured in the end."""
    run = Path(config.output_dir)
    results = json.loads((run / "results.json").read_text())
    (arm,) = results["arms"].values()
    facts = [arm["steps"], arm["train_tokens"], results["records"]]
    return (run / "model" / "model.safetensors").read_bytes(), facts


def validations(config: Config) -> dict[int, float]:
    lines = map(json.loads, (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["nats_per_token"] for line in lines if line["kind"] == "validation"}


def test_a_warm_up_left_to_auto_stays_what_the_run_began_with(make):
    auto = {"schedule": {"warmup_steps": "auto"}}
    train(make(20, **auto))
    train(make(40, **auto))
    assert read_config_tree(Path(make(40).output_dir))["schedule"]["warmup_steps"] == 2
    train(make(40, "whole"))
    assert outcome(make(40)) == outcome(make(40, "whole"))


def test_a_finished_run_that_is_lengthened_equals_a_longer_one(make, capsys):
    train(make(12))
    before = outcome(make(12))
    train(make(20))
    said = capsys.readouterr().out
    assert f"{make(12).output_dir}: lengthened from 12 to 20 steps; resumes from step 12\n" in said
    train(make(20, "whole"))
    assert outcome(make(20)) == outcome(make(20, "whole")) != before
    # The former end was validated besides.
    expected = validations(make(20, "whole"))
    assert validations(make(20)) == {**expected, 12: validations(make(20))[12]}
    assert read_config_tree(Path(make(20).output_dir))["training"]["steps"] == 20
    assert "20" in (Path(make(20).output_dir) / "report.html").read_text()
    # Finished again, it is left as it is.
    results = Path(make(20).output_dir) / "results.json"
    stamp = results.stat().st_mtime_ns
    train(make(20))
    assert results.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("steps", [10, 16])
def test_a_stopped_run_equals_one_that_had_its_new_length(steps, make, stop_at):
    stop_at(8, make(12))
    train(make(steps))
    train(make(steps, "whole"))
    assert outcome(make(steps)) == outcome(make(steps, "whole"))
    assert validations(make(steps)) == validations(make(steps, "whole"))


def test_before_its_decay_a_warmup_stable_decay_run_may_change(make, stop_at):
    schedule = {"kind": "warmup-stable-decay", "decay_fraction": 0.25}
    stop_at(8, make(12, schedule=schedule))
    train(make(16, schedule=schedule))
    train(make(16, "whole", schedule=schedule))
    assert outcome(make(16)) == outcome(make(16, "whole"))
    with pytest.raises(UserError, match=r"the rate of update 14, which it has taken, depends on"):
        train(make(40, schedule=schedule))


def test_what_cannot_change_is_said_and_left_alone(make, stop_at):
    stop_at(8, make(12))
    place = Path(make(12).output_dir)
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    for config, reason in (
        (make(8), "which cannot become 8: it is at step 8 already; choose another output_dir"),
        (make(5), "it is at step 8 already"),
        (make(20, seed=3), r"seed = 0, not 3 \(to change its length alone, give seed=0\)"),
    ):
        with pytest.raises(UserError, match=reason):
            train(config)
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_cosine_cannot_change_after_the_warmup(make, stop_at):
    cosine = {"schedule": {"kind": "cosine"}}
    stop_at(4, make(12, **cosine))
    with pytest.raises(UserError, match=r"by schedule.kind = cosine the rate of update 4, which"):
        train(make(20, **cosine))


def test_a_finished_run_without_checkpoints_stays_as_it_is(make):
    train(make(4))
    for path in (Path(make(4).output_dir) / "checkpoints").glob("step-*"):
        path.rename(path.with_name("moved"))
    with pytest.raises(UserError, match="its checkpoints are gone"):
        train(make(8))


def test_a_run_of_a_study_keeps_its_length(make, tmp_path):
    config = make(4, "study/kan/seed-0/stage-0-words")
    train(config)
    (tmp_path / "study" / "config.yaml").write_text("study: {arms: {kan: {}}}\n")
    with pytest.raises(UserError, match=r"the runs of a study keep their length, and .*study is"):
        train(make(8, "study/kan/seed-0/stage-0-words"))


def test_a_kill_between_results_and_settings_leaves_an_unfinished_run(make, monkeypatch):
    train(make(12))

    def fail(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_text", fail)
        with pytest.raises(KeyboardInterrupt):
            train(make(20))
    place = Path(make(12).output_dir)
    assert not (place / "results.json").exists()
    assert yaml.safe_load((place / "config.yaml").read_text())["training"]["steps"] == 12
    train(make(20))
    train(make(20, "whole"))
    assert outcome(make(20)) == outcome(make(20, "whole"))


@given(
    st.sampled_from(["cosine", "warmup-stable-decay", "constant"]),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 40),
    st.integers(0, 10),
)
def test_only_runs_whose_rates_agree_so_far_may_change(kind, before, after, step, warmup):
    schedule = ScheduleSettings(kind=kind, warmup_steps=min(warmup, before, after))
    step = min(step, before)
    config = Config(training=TrainingSettings(steps=after, evaluate_every=None), schedule=schedule)
    rates = [
        [learning_rate_ratio(schedule, s, steps) for s in range(step)] for steps in (before, after)
    ]
    allowed = why_not(before, config, step, finished=False) is None
    assert allowed == (step < after and rates[0] == rates[1])


@pytest.mark.parametrize(
    ("training", "step", "reason"),
    [
        ({"polish_steps": 3}, 10, "training.polish_steps = 3 changed it"),
        ({"polish_steps": 3}, 8, None),
        ({"keep_best_checkpoint": True, "evaluate_every": 5}, 10, None),
        ({"keep_best_checkpoint": True, "evaluate_every": 4}, 10, "might have decided on the best"),
        ({"early_stopping_patience": 2, "evaluate_every": 4}, 10, "might have decided"),
        ({"early_stopping_patience": 2, "evaluate_every": 4}, 8, None),
    ],
)
def test_what_was_done_at_the_former_end_counts(training, step, reason):
    config = Config(
        training=TrainingSettings(steps=20, **training),
        schedule=ScheduleSettings(kind="constant", warmup_steps=0),
    )
    found = why_not(10, config, step, finished=step == 10)
    assert found is None if reason is None else reason in found
