"""Real gloo processes that share a model by FSDP2 train it as one process does.

The processes go through several runs, one after another, in one process group: to start them
takes longer than to train.
"""

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from kanlm.config import Config, from_tree, load, merge, to_tree, to_yaml
from kanlm.errors import Interrupted
from kanlm.kan.sharding import from_own_part, gathered, own_part, own_rows
from kanlm.training import run as runs
from kanlm.training.callbacks import Callback
from kanlm.training.checkpointing.export import load_trained
from kanlm.training.resolve import resolve
from kanlm.training.sharding import fsdp_plugin
from kanlm.training.trainer import Trainer

TOLERANCES = {"fp64": 1e-9, "fp32": 1e-5}
SPLINES = {"kind": "kan-local", "basis": {"kind": "bspline", "degree": 2, "grid_size": 3}}
PENALTIES = {"l1": 1e-3, "entropy": 1e-3, "smoothness": 1e-3, "curvature": 1e-4}
#: Grids are refined and moved; the experts' balance is part of the loss.
KINDS: dict[str, dict[str, Any]] = {
    "swiglu": {"model": {"feed_forward": "swiglu"}},
    "kan": {"model": {"feed_forward": "kan"}, "penalties": {"l1": 1e-3, "entropy": 1e-3}},
    "adapting": {
        "penalties": PENALTIES,
        "model": {"feed_forward": SPLINES},
        "training": {"grid_schedule": {0: 3, 9: 6}, "grid_adaptation_steps": [4, 13]},
    },
    "moe": {"model": {"feed_forward": {"kind": "moe", "num_experts": 4, "experts": ["kan"]}}},
}
COMMON = {
    "model": {"dropout": 0.0, "tie_embeddings": True},
    # Adam divides a gradient by its own size: where one cancels to 1e-8, as one of an embedding
    # does here, float32's rounding would move a weight by as much as a gradient does.
    "optimizer": {"epsilon": 1e-5},
    "training": {"steps": 20, "log_every": 1, "evaluate_every": 10, "checkpoint_every": None},
}


def make(config: Config, folder: Path, kind: str, precision: str, sharding: str) -> Config:
    name = f"{kind}-{precision}-{sharding}"
    part = merge(COMMON, KINDS[kind])
    own = {"precision": precision, "sharding": sharding}
    part = merge(part, {"output_dir": str(folder / name), "training": own})
    return resolve(from_tree(merge(to_tree(config), part)))


def lines(config: Config, kind: str = "train") -> list[dict]:
    text = (Path(config.output_dir) / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


def weights(config: Config) -> dict[str, Tensor]:
    return load_file(Path(config.output_dir) / "model" / "model.safetensors")


class Watch(Callback):
    """Calls a function before every step."""

    def __init__(self, watch: Callable[[Trainer], None]) -> None:
        self.watch = watch

    def before_step(self) -> None:
        self.watch(self.trainer)


def check_own_parts(groups: list[dict[str, Any]]) -> None:
    """What we take for this process's rows is what torch put there."""
    for parameter in [p for group in groups for p in group["params"]]:
        start, stop = own_rows(parameter)
        whole = gathered(parameter.detach())
        assert torch.equal(own_part(parameter.detach()), whole[start:stop])
        again = from_own_part(parameter.detach(), whole[start:stop])
        assert torch.equal(gathered(again), whole)


def process(
    rank: int,
    processes: int,
    local: int,
    port: int,
    paths: list[Path],
    interrupt_at: int | None,
    by_accelerate: bool,
) -> None:
    """Be one of the processes, and go through the runs."""
    torch.set_num_threads(1)
    os.environ.update(
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_RANK": str(rank % local),
            "LOCAL_WORLD_SIZE": str(local),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
        }
    )
    leave_group = Accelerator.end_training
    Accelerator.end_training = lambda self: None  # type: ignore[method-assign]

    def watch(trainer: Trainer) -> None:
        # Of the model, those outside the blocks are whole after a pass without gradients.
        groups = trainer.optimizer.param_groups
        kinds = {
            isinstance(parameter, DTensor) for group in groups for parameter in group["params"]
        }
        check_own_parts(groups)
        sharding = trainer.config.training.sharding
        assert kinds == {sharding != "none"}
        if sharding == "hybrid":
            first = groups[0]["params"][0]
            assert isinstance(first, DTensor)
            assert first.device_mesh.shape == (processes // local, local)
        if trainer.state.step == interrupt_at and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    if by_accelerate:
        make_accelerator = runs._accelerator

        def with_plugin(config: Config) -> Accelerator:
            """As Accelerate itself would decide were these GPUs."""
            accelerator = make_accelerator(config)
            accelerator.state.distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = fsdp_plugin()
            return accelerator

        runs._accelerator = with_plugin

    for path in paths:
        config = load(path, [])
        try:
            runs.run(config, callbacks=[Watch(watch)])
        except Interrupted:
            assert interrupt_at is not None
        AcceleratorState._reset_state()
    leave_group(Accelerator(cpu=True))


def run_in(
    processes: int,
    configs: list[Config],
    *,
    local: int = 0,
    interrupt_at: int | None = None,
    by_accelerate: bool = False,
) -> None:
    """Run the configurations in so many processes, `local` of them to a machine."""
    paths = []
    for config in configs:
        paths.append(Path(config.output_dir).with_suffix(".yaml"))
        paths[-1].write_text(to_yaml(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (processes, local or processes, port, paths, interrupt_at, by_accelerate)
    spawn(process, arguments, nprocs=processes)


def check_alike(one: Config, other: Config, tolerance: float) -> None:
    """Losses of every step and validation, and the weights in the end."""
    for kind, name, count in [("train", "loss", 20), ("validation", "nats_per_token", 2)]:
        ours, theirs = ([line[name] for line in lines(c, kind)] for c in (one, other))
        assert len(ours) == count
        assert theirs == pytest.approx(ours, abs=tolerance)
    for name in ("gradient_norm", "update_norm"):
        ours, theirs = ([line[name] for line in lines(c)] for c in (one, other))
        assert theirs == pytest.approx(ours, rel=100 * tolerance)
    torch.testing.assert_close(weights(other), weights(one), rtol=0, atol=100 * tolerance)
    load_trained(Path(other.output_dir))


def test_two_processes_that_share_parameters_train_as_one(config: Config, tmp_path: Path):
    kinds = ("adapting", "moe")
    (tmp_path / "one").mkdir()
    alone = [make(config, tmp_path / "one", kind, "fp64", "none") for kind in kinds]
    shared = [make(config, tmp_path, kind, "fp64", "full") for kind in kinds]
    for each in alone:
        runs.run(each)
    run_in(2, shared)
    for ours, theirs in zip(alone, shared, strict=True):
        check_alike(ours, theirs, TOLERANCES["fp64"])


@pytest.mark.slow
@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_neither_number_nor_layout_of_processes_changes_the_losses(
    config: Config, tmp_path: Path, kind: str, precision: str
):
    """One process; two and four by DDP and by FSDP2; and two machines of two."""
    places = {name: tmp_path / name for name in ("one", "two", "four")}
    for place in places.values():
        place.mkdir()
    one = make(config, places["one"], kind, precision, "none")
    two = [make(config, places["two"], kind, precision, s) for s in ("none", "full")]
    four = [make(config, places["four"], kind, precision, s) for s in ("none", "full", "hybrid")]
    runs.run(one)
    run_in(2, two)
    run_in(4, four, local=2)
    for other in [*two, *four]:
        check_alike(one, other, TOLERANCES[precision])


@pytest.mark.slow
def test_accelerates_own_sharding_does_the_same(config: Config, tmp_path: Path):
    """What it does on GPUs, on CPUs that it takes for such."""
    (tmp_path / "one").mkdir()
    alone = make(config, tmp_path / "one", "adapting", "fp64", "none")
    shared = make(config, tmp_path, "adapting", "fp64", "full")
    runs.run(alone)
    run_in(2, [shared], by_accelerate=True)
    check_alike(alone, shared, TOLERANCES["fp64"])


@pytest.mark.slow
def test_a_shared_model_resumes_bit_for_bit(config: Config, tmp_path: Path):
    """Stopped between changes of the grids; with micro-batches and early stopping's best."""
    whole = make(config, tmp_path, "adapting", "fp32", "full")
    training = replace(whole.training, micro_batch_size=1, early_stopping_patience=5)
    whole = replace(whole, training=training)
    parts = replace(whole, output_dir=str(tmp_path / "parts"))
    run_in(2, [whole])
    run_in(2, [parts], interrupt_at=11)
    assert not (tmp_path / "parts" / "model").exists()
    run_in(2, [parts])
    ours, theirs = (weights(each) for each in (whole, parts))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = [[line["loss"] for line in lines(c)] for c in (whole, parts)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_shared_samples_and_bfloat16(config: Config, tmp_path: Path):
    """Every process samples, for each holds a part; masters stay in float32."""
    shared = make(config, tmp_path, "kan", "bf16", "full")
    shared = replace(shared, training=replace(shared.training, sample_every=10))
    (tmp_path / "one").mkdir()
    alone = make(config, tmp_path / "one", "kan", "bf16", "none")
    # Another precision needs another state.
    AcceleratorState._reset_state()
    runs.run(alone)
    AcceleratorState._reset_state()
    run_in(2, [shared])
    assert len(lines(shared, "sample")) == 2
    assert {tensor.dtype for tensor in weights(shared).values()} == {torch.float32}
    ours, theirs = ([line["loss"] for line in lines(c)] for c in (alone, shared))
    assert theirs == pytest.approx(ours, abs=0.02)


@pytest.mark.slow
def test_any_number_of_processes_goes_on_from_any_checkpoint(config: Config, tmp_path: Path):
    """Written by two, by two that share, and by two machines of two; read by one to four."""
    whole = make(config, tmp_path, "adapting", "fp64", "none")
    runs.run(whole)

    def of(sharding: str, name: str) -> Config:
        part = {"output_dir": str(tmp_path / name), "training": {"sharding": sharding}}
        return resolve(from_tree(merge(to_tree(whole), part)))

    writers = [of("none", "writer-2"), of("full", "writer-2-full"), of("hybrid", "writer-4")]
    run_in(2, writers[:2], interrupt_at=11)
    run_in(4, writers[2:], local=2, interrupt_at=11)
    saved = [Path(each.output_dir) / "checkpoints" / "step-00000012" for each in writers]
    assert [sorted(p.name for p in place.glob("[mo]*.safetensors")) for place in saved] == [
        ["model.safetensors", "optimizer.safetensors"],
        # Of two copies one is written.
        *[[f"{kind}-rank-{rank}.safetensors" for kind in ("model", "optimizer") for rank in (0, 1)]]
        * 2,
    ]
    sizes = [sum(p.stat().st_size for p in place.glob("model*.safetensors")) for place in saved]
    assert max(sizes) < 1.1 * min(sizes)

    readers: dict[int, list[Config]] = {1: [], 2: [], 4: []}
    for writer in writers:
        for processes, sharding in [
            (1, "none"),
            (2, "none"),
            (2, "full"),
            (4, "full"),
            (4, "hybrid"),
        ]:
            name = f"{Path(writer.output_dir).name}-read-by-{processes}-{sharding}"
            reader = of(sharding, name)
            for part in ("checkpoints", "metrics.jsonl", "config.yaml"):
                source, target = Path(writer.output_dir) / part, Path(reader.output_dir) / part
                target.parent.mkdir(exist_ok=True)
                shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
            readers[processes].append(reader)
    for reader in readers[1]:
        runs.run(reader)
    run_in(2, readers[2])
    run_in(4, readers[4], local=2)
    for reader in [each for group in readers.values() for each in group]:
        check_alike(whole, reader, TOLERANCES["fp64"])
