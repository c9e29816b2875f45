"""Ideas of a user, a class each: what they change, and that resuming them leaves no trace."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kanlm.config import Config, from_tree, merge, to_tree, to_yaml
from kanlm.errors import Interrupted, UserError
from kanlm.kan.sharding import split_as
from kanlm.training import run as runs
from kanlm.training.callbacks import Batch, Callback
from kanlm.training.checkpointing.callback_state import PreviousState
from kanlm.training.inheritance import inherit
from kanlm.training.resolve import resolve


class Replay(Callback):
    """Every second step trains on batches from the beginning again, one after the other."""

    def __init__(self) -> None:
        self.cursor = 0
        self.seen: dict[int, Tensor] = {}

    def batch(self, batch: Batch, step: int, rank: int, world_size: int) -> Batch:
        return self.trainer.batches.batch(self.cursor, rank, world_size) if step % 2 else batch

    def loss(self, batch: Batch, outputs: Any) -> None:
        self.seen[self.trainer.state.step] = batch["input_ids"]

    def after_step(self) -> None:
        # The step that is over had the number before.
        self.cursor += 1 - self.trainer.state.step % 2

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": self.cursor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.cursor = state["cursor"]


class Anchor(Callback):
    """Pulls parameters to where they started: L2-SP (Li et al. 2018), ½ λ Σ (w − w₀)²."""

    def __init__(self, weight: float = 0.5) -> None:
        self.weight = weight
        self.anchors: dict[str, Tensor] = {}

    def start(self, previous: PreviousState | None) -> None:
        self.anchors = {
            name: parameter.detach().clone()
            for name, parameter in self.trainer.model.named_parameters()
        }

    def penalty(self, model) -> Tensor:
        terms = [(p - self.anchors[name]).square().sum() for name, p in model.named_parameters()]
        return 0.5 * self.weight * sum(terms[1:], start=terms[0])

    def state_dict(self) -> dict[str, Any]:
        return {**self.anchors}


class Mask(Callback):
    """Lets the first half of every parameter's rows be, whatever the optimizer does."""

    def before_update(self) -> None:
        model = self.trainer.model
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def after_update(self) -> None:
        for name, parameter in self.trainer.model.named_parameters():
            parameter.copy_(torch.where(self.mask[name], parameter, self.before[name]))

    def start(self, previous: PreviousState | None) -> None:
        self.mask = {}
        for name, parameter in self.trainer.model.named_parameters():
            rows = torch.arange(parameter.shape[0]) >= parameter.shape[0] // 2
            whole = rows.view(-1, *[1] * (parameter.ndim - 1)).expand(parameter.shape)
            self.mask[name] = split_as(parameter, whole, alike=True).clone()

    def state_dict(self) -> dict[str, Any]:
        return {**self.mask}


class Distill(Callback):
    """Adds the cross entropy with a uniform teacher, a mean over tokens."""

    needs_logits = True

    def loss(self, batch: Batch, outputs: Any) -> Tensor:
        wanted = batch["shift_labels"] != -100
        return -0.1 * outputs.logits[wanted].double().log_softmax(-1).mean()


class Fisher(Callback):
    """At the end, the mean square of gradients over some batches; a next run finds it."""

    def __init__(self) -> None:
        self.previous: dict[str, Tensor] = {}
        self.batches = 0

    def start(self, previous: PreviousState | None) -> None:
        if previous is not None:
            self.batches = previous.values["batches"]
            parameters = dict(self.trainer.model.named_parameters())
            assert set(previous.names()) == set(parameters)
            self.previous = {
                name: previous.tensor(name, like=parameter)
                for name, parameter in parameters.items()
            }

    def finish(self, model) -> dict[str, Any]:
        trainer, accelerator = self.trainer, self.trainer.accelerator
        rank, ranks = accelerator.process_index, accelerator.num_processes
        found = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for step in range(2):
            trainer.compute_gradients(trainer.batches.batch(step, rank, ranks))
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                found[name] += parameter.grad.square() / 2
                parameter.grad = None
        return {**found, "batches": 2}


def changed(config: Config, **parts: Any) -> Config:
    return resolve(from_tree(merge(to_tree(config), parts)))


def exact(config: Config, **parts: Any) -> Config:
    part = {"model": {"dropout": 0.0}, "training": {"precision": "fp64", "log_every": 1}}
    return changed(config, **merge(part, parts))


def weights(config: Config) -> dict[str, Tensor]:
    return load_file(Path(config.output_dir) / "model" / "model.safetensors")


def metrics(config: Config) -> list[dict[str, Any]]:
    text = (Path(config.output_dir) / "metrics.jsonl").read_text()
    return [
        {k: v for k, v in line.items() if "second" not in k}
        for line in map(json.loads, text.splitlines())
    ]


def assert_same_run(one: Config, other: Config) -> None:
    assert metrics(one) == metrics(other)
    theirs = weights(other)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(one).items())


def test_all_moments_come_in_their_order(config: Config):
    moments: list[str] = []
    names = [
        *("start", "before_step", "batch", "loss", "penalty", "gradients", "before_update"),
        *("after_update", "after_step", "after_validation", "finish"),
    ]

    def noting(name: str):
        def note(self: Callback, *arguments: Any) -> Any:
            moments.append(name)
            return arguments[0] if name == "batch" else None

        return note

    watch = type("Watch", (Callback,), {name: noting(name) for name in names})
    runs.run(
        changed(config, training={"steps": 1}, schedule={"warmup_steps": 0}), callbacks=[watch()]
    )
    # A validation is what the run's own callback does after the step.
    after = ["after_update", "after_validation", "after_step", "finish"]
    assert moments == [*names[:7], *after]


def test_a_replayed_batch_is_the_one_that_is_trained_on(config: Config):
    replay = Replay()
    outcome = runs.run(config, callbacks=[replay])
    assert outcome is not None
    corpus = next(iter(outcome.corpora.values()))
    batches = runs.make_batches(corpus, config)
    for step, ids in replay.seen.items():
        expected = batches.batch(step // 2 if step % 2 else step)["input_ids"]
        assert torch.equal(ids, expected), step


def test_an_anchor_adds_its_gradient_once_whatever_the_micro_batches(config: Config, at):
    gradients: list[dict[str, Tensor]] = []

    def note(trainer) -> None:
        gradients.append({n: p.grad.clone() for n, p in trainer.model.named_parameters()})

    part = {"steps": 2, "gradient_clip": None}
    plain = exact(config, training=part)
    pulled = exact(config, output_dir=f"{config.output_dir}-2", training=part)
    micro = exact(
        config, output_dir=f"{config.output_dir}-3", training={**part, "micro_batch_size": 1}
    )
    anchor = Anchor()
    # Another start than where it pulls to.
    move = at(0, lambda trainer: [p.data.add_(0.1) for p in trainer.model.parameters()])
    watch = at(0, note, "gradients")
    watch.name = "Watch"
    runs.run(plain, callbacks=[move, watch])
    for each in (pulled, micro):
        runs.run(each, callbacks=[anchor, move, watch])
    before, *pulls = gradients
    for after in pulls:
        for name, gradient in after.items():
            added = torch.full_like(gradient, 0.5 * 0.1)
            torch.testing.assert_close(gradient - before[name], added, rtol=0, atol=1e-9)
    count = sum(tensor.numel() for tensor in anchor.anchors.values())
    (line,) = [x for x in metrics(pulled) if (x["kind"], x["step"]) == ("train", 1)]
    assert line["penalty/Anchor"] == pytest.approx(0.25 * 0.01 * count)
    assert line["loss"] == metrics(plain)[0]["loss"]


def test_a_term_of_the_outputs_does_not_depend_on_micro_batches(config: Config):
    whole = exact(config, training={"steps": 3})
    split = exact(
        config,
        output_dir=f"{config.output_dir}-2",
        training={"steps": 3, "micro_batch_size": 1},
    )
    for each in (whole, split):
        runs.run(each, callbacks=[Distill()])
    for ours, theirs in zip(metrics(whole), metrics(split), strict=True):
        for name in ("loss", "loss/Distill", "gradient_norm"):
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-12)
    # The model has hardly begun: no less than, and not far from, 0.1 ln 257.
    assert 0 < metrics(whole)[0]["loss/Distill"] - 0.1 * math.log(257) < 0.1


def test_masked_rows_stay_and_the_others_move(config: Config):
    before: dict[str, Tensor] = {}

    class Start(Callback):
        def start(self, previous: PreviousState | None) -> None:
            before.update({n: p.detach().clone() for n, p in self.trainer.model.named_parameters()})

    runs.run(config, callbacks=[Start(), Mask()])
    for name, tensor in weights(config).items():
        if name in before:
            half = tensor.shape[0] // 2
            assert torch.equal(tensor[:half], before[name][:half]), name
            assert not torch.equal(tensor[half:], before[name][half:]), name
    # Decay moves what has no gradient, too, and is measured as it was let through.
    assert all(x["update_norm"] > 0 for x in metrics(config) if x["kind"] == "train")


@pytest.mark.parametrize("stop", [5, 6])
def test_state_is_a_part_of_checkpoints_and_resumes_bit_for_bit(
    config: Config, tmp_path: Path, at, stop: int
):
    """After a checkpoint, and in a step with a validation, which is left to the resumed run."""

    def callbacks() -> list[Callback]:
        return [Replay(), Anchor(), Mask()]

    runs.run(config, callbacks=callbacks())
    other = replace(config, output_dir=str(tmp_path / "other"))
    interrupt = at(stop - 1, lambda _: os.kill(os.getpid(), signal.SIGTERM), "after_update")
    with pytest.raises(Interrupted):
        runs.run(other, callbacks=[*callbacks(), interrupt])
    runs.run(other, callbacks=callbacks())
    assert_same_run(config, other)


def test_what_a_checkpoint_lacks_or_has_too_much_of_is_refused(config: Config, tmp_path: Path, at):
    def crash(trainer) -> None:
        raise ZeroDivisionError

    class Grown(Anchor):
        name = "Anchor"

        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "more": torch.zeros(2)}

    class Renamed(Replay):
        name = "Replay"

        def state_dict(self) -> dict[str, Any]:
            return {"place": self.cursor}

    with pytest.raises(ZeroDivisionError):
        runs.run(config, callbacks=[Replay(), Anchor(), at(6, crash)])
    for callbacks, said in [
        ([Anchor()], "holds callback that this run has not: Replay"),
        ([Replay(), Anchor(), Mask()], "lacks callback: Mask"),
        ([Replay(), Grown()], r"lacks .* Anchor:more"),
        ([Renamed(), Anchor()], "lacks .* Replay.* place"),
    ]:
        with pytest.raises(UserError, match=said) as caught:
            runs.run(config, callbacks=callbacks)
        assert "\n" not in str(caught.value)
    # One that keeps nothing may come and go.
    runs.run(config, callbacks=[Replay(), Anchor(), at(0, crash)])


def test_two_of_one_name_and_tensors_under_changing_grids_are_refused(config: Config):
    with pytest.raises(UserError, match="two callbacks are named Replay"):
        runs.run(config, callbacks=[Replay(), Replay()])
    splines = {"kind": "kan-local", "basis": {"grid_size": 2}}
    training = {"grid_schedule": {0: 2, 4: 4}}
    with pytest.raises(UserError, match=r"callback Anchor .* grids.*training\.grid_schedule"):
        runs.run(
            changed(config, model={"feed_forward": splines}, training=training),
            callbacks=[Anchor()],
        )


def test_the_end_may_change_the_model_and_leave_state_to_the_next_run(
    config: Config, tmp_path: Path
):
    class Halve(Callback):
        @torch.no_grad()
        def finish(self, model) -> None:
            for parameter in model.parameters():
                parameter.mul_(0.5)

    plain = exact(config, training={"steps": 3})
    halved = replace(plain, output_dir=str(tmp_path / "halved"))
    first = runs.run(plain, callbacks=[Fisher()])
    second = runs.run(halved, callbacks=[Halve()])
    ours, theirs = weights(plain), weights(halved)
    assert all(torch.equal(0.5 * ours[name], theirs[name]) for name in ours if "knots" not in name)
    assert first is not None
    assert second is not None
    assert first.evaluations["words"].nats_per_token != second.evaluations["words"].nats_per_token
    assert not (tmp_path / "halved" / "callbacks").exists()

    tree = to_tree(plain)
    del tree["model"], tree["tokenizer"]
    start = {"initialize_from": plain.output_dir, "output_dir": str(tmp_path / "tuned")}
    fisher = Fisher()
    runs.run(resolve(inherit({**tree, **start})), callbacks=[fisher])
    kept = load_file(Path(plain.output_dir) / "callbacks" / "callbacks.safetensors")
    assert fisher.batches == 2
    assert fisher.previous.keys() == {name.removeprefix("Fisher:") for name in kept}
    for name, tensor in fisher.previous.items():
        assert torch.equal(tensor.cpu(), kept[f"Fisher:{name}"])
        assert tensor.sum() > 0


PROGRAM = """
import os, signal, sys
sys.path.insert(0, {folder!r})
from test_callbacks import Anchor, Distill, Fisher, Mask, Replay
from kanlm import load, train
from kanlm.errors import Interrupted
from kanlm.training.callbacks import Callback


class Stop(Callback):
    def after_update(self):
        if self.trainer.state.step == 6 and sys.argv[2:] and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)


try:
    train(load(sys.argv[1]), [Replay(), Anchor(), Distill(), Mask(), Fisher(), Stop()])
except Interrupted:
    assert sys.argv[2:]
"""


def in_two(config: Config, folder: Path, *arguments: str) -> None:
    program, path = folder / "program.py", Path(config.output_dir).with_suffix(".yaml")
    program.write_text(PROGRAM.format(folder=str(Path(__file__).parent)))
    path.write_text(to_yaml(config))
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(program), str(path), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("sharding", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_two_processes_compute_with_callbacks_what_one_does(
    config: Config, tmp_path: Path, sharding: str
):
    """All of them at once; state is sharded as parameters are, and another number reads it."""
    alone = exact(config)
    runs.run(alone, callbacks=[Replay(), Anchor(), Distill(), Mask(), Fisher()])
    two = exact(config, output_dir=str(tmp_path / "two"), training={"sharding": sharding})
    in_two(two, tmp_path, "stop")
    assert not (tmp_path / "two" / "model").exists()
    one = replace(alone, output_dir=str(tmp_path / "resumed-by-one"))
    shutil.copytree(two.output_dir, one.output_dir)
    in_two(two, tmp_path)
    runs.run(one, callbacks=[Replay(), Anchor(), Distill(), Mask(), Fisher()])
    expected = metrics(alone)
    for other in (two, one):
        for ours, theirs in zip(metrics(other), expected, strict=True):
            numbers = {k: v for k, v in theirs.items() if isinstance(v, int | float)}
            assert {k: ours[k] for k in numbers} == pytest.approx(numbers, abs=1e-8)
        torch.testing.assert_close(weights(other), weights(alone), rtol=0, atol=1e-8)
    fishers = []
    for config_ in (alone, two):
        folder = Path(config_.output_dir) / "callbacks"
        files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
        names = {name for file in files for name in file}
        fishers.append(
            {n: torch.cat([file[n] for file in files if n in file]).double() for n in names}
        )
    torch.testing.assert_close(fishers[1], fishers[0], rtol=0, atol=1e-8)
