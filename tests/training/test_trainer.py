"""The loop on a tiny model: what it computes, and that interruptions leave no trace."""

import json
import math
import os
import pkgutil
import resource
import signal
from collections.abc import Container
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kanlm.checksums import file_sha256
from kanlm.config import Config, from_tree, merge, to_tree, to_yaml
from kanlm.data.corpus import open_corpus, open_tokenizer
from kanlm.errors import Interrupted, UserError
from kanlm.experiments.single import train
from kanlm.training import run as runs
from kanlm.training.callbacks import Callback
from kanlm.training.inheritance import inherit
from kanlm.training.resolve import resolve
from kanlm.training.run_folder import lock_folder
from kanlm.training.trainer import Trainer


def changed(config: Config, **parts) -> Config:
    return resolve(from_tree(merge(to_tree(config), parts)))


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model" / "model.safetensors")


def metrics(folder: str) -> list[dict]:
    lines = [json.loads(x) for x in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def assert_same_run(one: str, other: str) -> None:
    assert metrics(one) == metrics(other)
    theirs = weights(other)
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, theirs[name]), name


def test_the_loss_falls_below_the_entropy_of_single_bytes(config: Config):
    longer = changed(config, training={"steps": 150}, optimizer={"learning_rate": 0.01})
    outcome = runs.run(longer)
    assert outcome is not None
    text = (Path(config.data.sources[0]["path"])).read_text()
    shares = [text.count(c) / len(text) for c in set(text)]
    unigram = -sum(p * math.log2(p) for p in shares)
    assert outcome.evaluations["words"].bits_per_byte < 0.75 * unigram


def test_metrics_hold_every_line_that_was_asked_for(config: Config):
    runs.run(config)
    lines = metrics(config.output_dir)
    steps = {
        kind: [x["step"] for x in lines if x["kind"] == kind]
        for kind in ("train", "validation", "sample")
    }
    assert steps == {"train": [3, 6, 9, 12], "validation": [5, 10, 12], "sample": [12]}
    tokens = [x["tokens"] for x in lines if x["kind"] == "train"]
    assert tokens == [3 * 4 * 16 * k for k in (1, 2, 3, 4)]


MUON = {"optimizer": {"kind": "muon", "muon_coefficients": True}}
POLISH = {"training": {"polish_steps": 3}, "penalties": {"l1": 1e-3}}


@pytest.mark.parametrize(
    ("settings", "stop", "part"),
    [
        ("config", 1, {}),
        ("config", 4, {}),
        ("config", 7, {}),
        ("config", 11, {}),
        ("config", 7, MUON),
        ("config", 11, POLISH),
        ("routed", 7, {}),
    ],
    ids=str,
)
def test_a_signal_saves_and_the_same_command_goes_on_bit_for_bit(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    at,
    settings: str,
    stop: int,
    part: dict,
):
    config: Config = changed(request.getfixturevalue(settings), **part)
    runs.run(config)
    other = replace(config, output_dir=str(tmp_path / "other"))
    terminate = at(stop - 1, lambda _: os.kill(os.getpid(), signal.SIGTERM), "after_update")
    with pytest.raises(Interrupted) as caught:
        runs.run(other, callbacks=[terminate])
    assert caught.value.exit_code == 128 + signal.SIGTERM
    assert not (tmp_path / "other" / "model").exists()
    runs.run(other)
    assert_same_run(config.output_dir, other.output_dir)


LONG_SAMPLE = {"generation": {"max_new_tokens": 40}}


@pytest.mark.parametrize(
    ("where", "call", "step", "lines"),
    [
        # The validation passes over three batches of windows.
        ("kanlm.training.metrics.TrainLog.after_update", 5, 5, ["train"]),
        ("kanlm.evaluation.perplexity._score", 2, 5, ["train"]),
        ("kanlm.training.metrics.TrainLog.after_update", 12, 12, ["train"]),
        ("kanlm.training.lbfgs_polish._split", 1, 12, ["train", "validation", "grid"]),
        ("kanlm.training.lbfgs_polish._add", 3, 12, ["train", "validation", "grid"]),
        (
            "kanlm.training.tracking.Tracker.print_line",
            4,
            12,
            ["train", "validation", "grid", "polish"],
        ),
        (
            "kanlm.training.sampling._Calling.__call__",
            3,
            12,
            ["train", "validation", "grid", "polish", "validation", "grid"],
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, str | int) else "",
)
def test_ctrl_c_stops_after_the_update_and_the_rest_is_done_after_the_resume(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    call: int,
    step: int,
    lines: list[str],
):
    """Before or in the middle of a validation, the polish or a sample."""
    config = changed(
        config,
        training={"polish_steps": 2, "log_every": 1, "keep_best_checkpoint": True},
        evaluation={"batch_size": 4},
    )
    runs.run(config)
    other = replace(config, output_dir=str(tmp_path / "other"))
    calls = 0
    original = pkgutil.resolve_name(where)

    def interrupting(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(where, interrupting)
        with pytest.raises(Interrupted) as caught:
            runs.run(other)
    assert caught.value.exit_code == 128 + signal.SIGINT
    written = metrics(other.output_dir)
    assert [line["kind"] for line in written if line["step"] == step] == lines
    assert max(line["step"] for line in written) == step
    runs.run(other)
    assert_same_run(config.output_dir, other.output_dir)
    states = [Path(c.output_dir) / "checkpoints/step-00000012/state.json" for c in (config, other)]
    ours, theirs = (
        {k: v for k, v in json.loads(path.read_text()).items() if "seconds" not in k}
        for path in states
    )
    assert {**ours, "window": None} == {**theirs, "window": None}


def test_what_was_done_after_a_resume_that_crashed_is_done_again(
    config: Config, tmp_path: Path, at
):
    """Its lines are of the step of the checkpoint that is gone on from, and stand there once."""
    config = changed(config, training={"checkpoint_every": None})
    runs.run(config)
    other = replace(config, output_dir=str(tmp_path / "other"))
    interrupt = at(4, lambda _: os.kill(os.getpid(), signal.SIGINT), "after_update")
    with pytest.raises(Interrupted):
        runs.run(other, callbacks=[interrupt])
    with pytest.raises(ZeroDivisionError):
        runs.run(other, callbacks=[at(7, crash)])
    assert [x["step"] for x in metrics(other.output_dir) if x["kind"] == "validation"] == [5]
    runs.run(other)
    assert_same_run(config.output_dir, other.output_dir)


def crash(trainer: Trainer) -> None:
    raise ZeroDivisionError


def test_a_crash_goes_on_from_the_last_checkpoint_bit_for_bit(config: Config, tmp_path: Path, at):
    runs.run(config)
    other = replace(config, output_dir=str(tmp_path / "other"))
    with pytest.raises(ZeroDivisionError):
        runs.run(other, callbacks=[at(10, crash)])
    runs.run(other)
    assert_same_run(config.output_dir, other.output_dir)


def disturbing(at, steps: Container[int], value: float) -> Callback:
    """Makes the gradient of one parameter `value` in these steps."""

    def disturb(trainer: Trainer) -> None:
        gradient = next(trainer.model.parameters()).grad
        assert gradient is not None
        gradient.fill_(value)

    return at(steps, disturb, "gradients")


def test_a_step_without_a_finite_gradient_is_left_out_and_counted(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at
):
    """Weights and moments are those of a run in which that update did nothing at all."""
    config = changed(config, training={"log_every": 1, "steps": 6, "checkpoint_every": 1})
    with monkeypatch.context() as patch:
        clock = iter(range(10**9, 0, -1))
        patch.setattr("time.time", lambda: float(next(clock)))
        outcome = runs.run(config, callbacks=[disturbing(at, {3}, math.nan)])
    assert outcome is not None
    assert outcome.progress.guard.skipped_steps == 1
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (unusual,) = [line for line in lines if line["kind"] == "unusual"]
    assert (unusual["step"], unusual["skipped"]) == (4, True)
    assert "norm nan" in unusual["what"]
    trained = [line for line in lines if line["kind"] == "train"]
    assert [(line["step"], line["skipped_steps"]) for line in trained] == [
        (1, 0),
        (2, 0),
        (3, 0),
        (5, 1),
        (6, 1),
    ]
    # The clock of the wall went backwards all the time.
    assert all(line["seconds"] > 0 and line["tokens_per_second"] > 0 for line in trained)
    other = replace(config, output_dir=str(tmp_path / "other"))
    update = torch.optim.AdamW.step
    calls = iter(range(100))

    def idle(self, closure=None):
        return None if next(calls) == 3 else update(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", idle)
    runs.run(other)
    theirs = weights(other.output_dir)
    for name, tensor in weights(config.output_dir).items():
        assert torch.equal(tensor, theirs[name]), name


def test_too_many_such_steps_end_the_run_and_leave_the_last_good_checkpoint(
    config: Config, tmp_path: Path, at
):
    part = {"checkpoint_every": 1, "keep_checkpoints": 1, "max_skipped_steps": 3, "steps": 12}
    config = changed(config, training=part)
    disturb = disturbing(at, range(5, 12), math.inf)
    with pytest.raises(UserError, match=r"step 8: .* norm inf; 3 steps in a row"):
        runs.run(config, callbacks=[disturb])
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert kept == ["step-00000005"]


def test_a_run_that_gives_up_keeps_what_is_being_written(config: Config, tmp_path: Path, at):
    """The checkpoint before the trouble is good, and may take longer to write than the trouble."""
    part = {"checkpoint_every": 5, "background_checkpoints": "on", "max_skipped_steps": 1}
    config = changed(config, training=part)
    disturb = disturbing(at, range(5, 12), math.inf)
    with pytest.raises(UserError, match="the last good checkpoint is kept"):
        runs.run(config, callbacks=[disturb])
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert kept == ["step-00000005"]


def test_weights_that_are_no_numbers_are_never_the_best(config: Config, tmp_path: Path, at):
    """Saved as such while steps are left out, they would push out the last good checkpoint."""
    part = {
        "checkpoint_every": 1,
        "keep_checkpoints": 1,
        "keep_best_checkpoint": True,
        "evaluate_every": 4,
        "max_skipped_steps": 3,
    }
    config = changed(config, training=part)

    def spoil(trainer: Trainer) -> None:
        with torch.no_grad():
            next(trainer.model.parameters()).fill_(math.nan)

    with pytest.raises(UserError, match="the last good checkpoint is kept"):
        runs.run(config, callbacks=[at(2, spoil)])
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert kept == ["step-00000002"]


def change_text(config: Config) -> None:
    """Make the shards of another text, consistently, under the same name."""
    (folder,) = Path(config.data.cache_dir).glob("words-*/")
    manifest = json.loads((folder / "manifest.json").read_text())
    (shard,) = [s for s in manifest["shards"] if s["split"] == "train"]
    path = folder / f"{shard['name']}.tokens.npy"
    tokens = np.load(path)
    tokens[:100] = tokens[0]
    np.save(path, tokens)
    shard["sha256"][path.name] = file_sha256(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_run_does_not_go_on_with_another_text(config: Config, at):
    with pytest.raises(ZeroDivisionError):
        runs.run(config, callbacks=[at(6, crash)])
    change_text(config)
    with pytest.raises(UserError, match="was trained on other text"):
        runs.run(config)


@pytest.mark.parametrize("gone", [False, True])
def test_a_shard_that_changes_under_a_run_ends_it_before_the_next_checkpoint(
    config: Config, tmp_path: Path, at, gone: bool
):
    def change(trainer: Trainer) -> None:
        (path,) = Path(config.data.cache_dir).glob("words-*/train-*.tokens.npy")
        if gone:
            path.unlink()
            return
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\7")

    with pytest.raises(UserError, match="missing" if gone else "does not match the manifest"):
        runs.run(config, callbacks=[at(6, change)])
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert kept == ["step-00000004"]


def test_a_second_job_in_the_same_folder_is_refused(config: Config, tmp_path: Path):
    with lock_folder(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
        with pytest.raises(UserError, match="in use by process"):
            runs.run(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("largest", [2**10, 2**15, 2**16])
def test_a_write_that_fails_anywhere_is_one_line_and_the_run_goes_on_later(
    config: Config, tmp_path: Path, largest: int, capsys: pytest.CaptureFixture[str]
):
    """No file may grow over a size, as on a disk that fills up: the first, or a later one."""
    open_corpus(config.data, open_tokenizer(config.tokenizer, config.data))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        with capsys.disabled(), pytest.raises(UserError, match="cannot be written: ") as caught:
            train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").rglob("*.draft"))
    train(config)
    assert (tmp_path / "run" / "results.json").exists()


def test_micro_batches_change_nothing_but_rounding(config: Config, tmp_path: Path):
    exact = changed(config, model={"dropout": 0.0}, training={"precision": "fp64"})
    split = changed(exact, output_dir=str(tmp_path / "micro"), training={"micro_batch_size": 1})
    runs.run(exact)
    runs.run(split)
    for ours, theirs in zip(metrics(exact.output_dir), metrics(split.output_dir), strict=True):
        if ours["kind"] == "train":
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-10)


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_a_penalty_adds_its_gradient_once_a_step(
    config: Config, tmp_path: Path, at, micro_batch_size: int | None
):
    """2 λ c for squared coefficients, whatever the micro-batches; the loss stays what it was."""
    exact = changed(
        config,
        model={"dropout": 0.0},
        training={
            "precision": "fp64",
            "steps": 2,
            "log_every": 1,
            "gradient_clip": None,
            "micro_batch_size": micro_batch_size,
        },
    )
    seen: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = []

    def note(trainer: Trainer) -> None:
        seen.append(
            {
                name: (p.detach().clone(), p.grad.clone())
                for name, p in trainer.model.named_parameters()
                if p.grad is not None
            }
        )

    watch = at({0, 1}, note, "before_update")
    runs.run(exact, callbacks=[watch])
    penalised = changed(exact, output_dir=str(tmp_path / "l2"), penalties={"l2": 0.3})
    runs.run(penalised, callbacks=[watch])
    before, _, after, _ = seen
    for name, (weight, gradient) in after.items():
        added = 0.6 * weight if name.endswith("coefficients") else torch.zeros_like(weight)
        torch.testing.assert_close(gradient - before[name][1], added, rtol=0, atol=1e-10)
    [plain, *_], [line, *_] = metrics(exact.output_dir), metrics(penalised.output_dir)
    assert line["loss"] == pytest.approx(plain["loss"], abs=1e-10)
    squares = sum(w.square().sum() for n, (w, _) in after.items() if n.endswith("coefficients"))
    assert line["penalty"] == pytest.approx(0.3 * float(squares), rel=1e-9)
    assert "penalty" not in plain


def test_early_stopping_ends_and_keeps_the_best_model(config: Config):
    # Without learning, the first validation stays the best: two more and it is over.
    stopping = changed(
        config,
        optimizer={"learning_rate": 1e-30, "weight_decay": 0.0, "coefficients_weight_decay": 0.0},
        training={"steps": 100, "evaluate_every": 2, "early_stopping_patience": 2},
    )
    outcome = runs.run(stopping)
    assert outcome is not None
    assert outcome.progress.step < 100
    assert outcome.progress.stale_validations == 2
    best = Path(stopping.output_dir) / "checkpoints" / "step-00000002" / "model.safetensors"
    saved, kept = load_file(best), weights(stopping.output_dir)
    assert all(torch.equal(saved[name], tensor) for name, tensor in kept.items())


def test_the_best_model_is_kept_when_its_step_was_left_out(config: Config, at):
    """Its weights are those of the step before, and good."""
    stopping = changed(
        config,
        optimizer={"learning_rate": 1e-30, "weight_decay": 0.0, "coefficients_weight_decay": 0.0},
        training={"steps": 100, "evaluate_every": 2, "early_stopping_patience": 2},
    )
    outcome = runs.run(stopping, callbacks=[disturbing(at, {1}, math.nan)])
    assert outcome is not None
    assert outcome.progress.guard.skipped_steps == 1


def test_a_folder_of_other_settings_is_refused(config: Config):
    runs.run(config)
    with pytest.raises(UserError, match=r"optimizer\.learning_rate = 0\.006, not 0\.1"):
        train(changed(config, optimizer={"learning_rate": 0.1}))


def test_a_checkpoint_of_another_architecture_is_refused(config: Config, tmp_path: Path):
    runs.run(config)
    other = changed(config, output_dir=str(tmp_path / "o"), model={"feed_forward": "swiglu"})
    (tmp_path / "o").mkdir()
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "o" / "checkpoints")
    runs.write_config(tmp_path / "o", other)
    with pytest.raises(UserError, match="another architecture"):
        runs.run(other)


def test_fine_tuning_starts_from_the_base_run(config: Config, tmp_path: Path):
    runs.run(config)
    tree = to_tree(config)
    del tree["model"], tree["tokenizer"]
    tuned = resolve(
        inherit({**tree, "initialize_from": config.output_dir, "output_dir": str(tmp_path / "ft")})
    )
    still = changed(
        tuned,
        optimizer={"learning_rate": 1e-30, "weight_decay": 0.0, "coefficients_weight_decay": 0.0},
    )
    runs.run(still)
    base = weights(config.output_dir)
    for name, tensor in weights(still.output_dir).items():
        assert torch.equal(tensor, base[name]), name


def test_fine_tuning_refuses_another_tokenizer(config: Config):
    runs.run(config)
    tree = {**to_tree(config), "initialize_from": config.output_dir}
    tree["tokenizer"] = {"kind": "characters"}
    with pytest.raises(UserError, match=r"tokenizer\.kind = characters differs from bytes"):
        inherit(tree)
