"""Two processes with half the batch each compute what one does, wrapped by DDP or by FSDP2.

The loop wraps models by DDP; FSDP2 is for those who bring the layers into a loop of their
own. It hands a layer its parameters in the moment of its forward pass and takes them away
afterwards, so it finds out code that keeps them or reads them at another time. In between
each process holds a part of them, which starts and moves as that part of the whole.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from kanlm.config import OptimizerSettings
from kanlm.kan import BASES, BSpline, KANLinear, SharedFunctionLinear
from kanlm.model import KanLMConfig, KanLMForCausalLM, loss
from kanlm.model.decoder import KanLMDecoderLayer
from kanlm.model.feed_forward import FEED_FORWARDS, make_feed_forward
from kanlm.training.optimizer import build_optimizer

PROCESSES, STEPS, ROWS, LENGTH, WIDTH, VOCAB = 2, 3, 4, 6, 6, 11
#: Differences are of the order of 1e-15: sums over rows in another order.
TOLERANCE = 1e-12

HIDDEN = {"hidden": 5}  # which two processes cannot share evenly
BLOCKS: dict[str, dict[str, Any]] = {
    "gelu": {"kind": "gelu", **HIDDEN},
    "relu2": {"kind": "relu2", **HIDDEN},
    "swiglu": {"kind": "swiglu", **HIDDEN},
    "kan-bspline1": {"kind": "kan-local", **HIDDEN},
    "kan-bspline3": {"kind": "kan", "basis": {"kind": "bspline", "degree": 3}, **HIDDEN},
    "kan-hermite": {"kind": "kan", "basis": {"kind": "hermite"}, **HIDDEN},
    "kan-rational": {"kind": "kan", "basis": {"kind": "rational"}, **HIDDEN},
    "kan-glu": {"kind": "kan-glu", **HIDDEN},
    "kan-single": {"kind": "kan-single"},
    "spline-mlp": {"kind": "spline-mlp", "gate": True, **HIDDEN},
    "kat": {"kind": "kat", "groups": 2, "hidden": 4},
    "lowrank-kan": {"kind": "lowrank-kan", **HIDDEN},
    "moe": {"kind": "moe", "num_experts": 8, **HIDDEN},
    "moe-undropped": {"kind": "moe", "top_k": 1, "capacity_factor": None, **HIDDEN},
    "conv-kan": {"kind": "conv-kan", **HIDDEN},
}
#: Also every basis, and starts that are computed.
STARTS: dict[str, dict[str, Any]] = {
    **BLOCKS,
    **{
        f"linear-{kind}": {"kind": "kan", "basis": {"kind": kind}, "start": "linear", **HIDDEN}
        for kind in BASES
    },
    "lowrank-kan-silu": {"kind": "lowrank-kan", "start": "silu", **HIDDEN},
}
#: A decoder with several of them.
MODEL = "model"
CASES = [*BLOCKS, MODEL]
WRAPPERS = ("ddp", "fsdp")


@dataclass
class Numbers:
    """What was computed: outputs in evaluation and of each step, and the rest by step."""

    outputs: list[Tensor] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    parameters: list[dict[str, Tensor]] = field(default_factory=list)


def make(case: str) -> nn.Module:
    """In float64, the same in every process."""
    torch.manual_seed(0)
    if case != MODEL:
        return make_feed_forward(BLOCKS[case], WIDTH, 1.0).double()
    # A large loss for balance, in which one factor is of all processes' tokens.
    experts = {"kind": "moe", "num_experts": 2, "top_k": 1, "balance_loss": 1.0, **HIDDEN}
    config = KanLMConfig(
        vocab_size=VOCAB,
        d_model=WIDTH,
        n_layers=3,
        n_heads=1,
        context_length=LENGTH,
        dropout=0.0,
        feed_forward=[BLOCKS["kan-rational"], experts, BLOCKS["conv-kan"]],
    )
    return KanLMForCausalLM(config).double()


def train(case: str, module: nn.Module, rows: slice = slice(None)) -> Numbers:
    """Evaluate, then take a few steps of AdamW, on these rows of every batch."""
    settings = OptimizerSettings(learning_rate=0.01, weight_decay=0.1)
    optimizer = build_optimizer(module, settings)
    numbers = Numbers()
    with torch.no_grad():
        # One token a row: too few to be sent to every expert.
        numbers.outputs.append(run(module.eval(), batch(case, STEPS)[rows, :1])[0])
    module.train()
    for step in range(STEPS):
        output, value = run(module, batch(case, step)[rows])
        value.backward()
        numbers.outputs.append(output.detach())
        named = {name.removeprefix("module."): p for name, p in module.named_parameters()}
        numbers.gradients.append({name: whole(p.grad) for name, p in named.items()})
        optimizer.step()
        optimizer.zero_grad()
        numbers.parameters.append({name: whole(p) for name, p in named.items()})
    return numbers


def batch(case: str, seed: int) -> Tensor:
    """Token ids for the decoder, and vectors for a block."""
    draw = torch.Generator().manual_seed(seed)
    if case == MODEL:
        return torch.randint(VOCAB, (ROWS, LENGTH), generator=draw)
    return torch.randn(ROWS, LENGTH, WIDTH, generator=draw, dtype=torch.float64)


def run(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs, and a loss that is a mean over tokens."""
    if x.is_floating_point():
        output = module(x)
        return output, output.square().mean()
    result = module(input_ids=x, labels=x)
    # In training there are no logits.
    return x.new_zeros(0) if result.logits is None else result.logits, result.loss


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def wrap(module: nn.Module, wrapper: str) -> nn.Module:
    if wrapper == "ddp":
        return DistributedDataParallel(module)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    model = isinstance(module, KanLMForCausalLM)
    apart = (KanLMDecoderLayer,) if model else (KANLinear, SharedFunctionLinear)
    for part in module.modules():
        if isinstance(part, apart):
            fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


@contextmanager
def joined(rank: int, folder: Path) -> Iterator[None]:
    """Be one of the processes."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=60),
    )
    yield
    dist.destroy_process_group()


def process(rank: int, folder: Path) -> None:
    """Train every case under every wrapper, and write what came of it. Losses of decoders are
    computed in parts, which those of one process alone are not."""
    loss.CHUNK_BYTES, loss.TILE = 0, 5
    size = ROWS // PROCESSES
    rows = slice(rank * size, (rank + 1) * size)
    found = {}
    with joined(rank, folder):
        for case in CASES:
            for wrapper in WRAPPERS:
                found[case, wrapper] = train(case, wrap(make(case), wrapper), rows)
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Numbers]]:
    """What each process computed."""
    folder = tmp_path_factory.mktemp("processes")
    spawn(process, (folder,), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


def test_every_kind_is_among_the_cases() -> None:
    assert {spec["kind"] for spec in BLOCKS.values()} == set(FEED_FORWARDS)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_what_one_does(found: list, case: str, wrapper: str) -> None:
    """Outputs, and the gradients and parameters of every step."""
    expected = train(case, make(case))
    processes = [each[case, wrapper] for each in found]
    together = [torch.cat(parts) for parts in zip(*(p.outputs for p in processes), strict=True)]
    for ours, theirs in [
        (together, expected.outputs),
        *((each.gradients, expected.gradients) for each in processes),
        *((each.parameters, expected.parameters) for each in processes),
    ]:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def make_start(case: str) -> nn.Module:
    return make(case) if case == MODEL else make_feed_forward(STARTS[case], WIDTH, 1.0)


def reset(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """Have each module reset itself, and return whole parameters and buffers."""
    torch.manual_seed(seed)
    for part in module.modules():
        if callable(start := getattr(part, "reset_parameters", None)):
            start()
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: whole(tensor) for name, tensor in named}


def sharded_start(case: str, rank: int) -> dict[str, Tensor]:
    """Built without memory, sharded, given memory and reset."""
    with torch.device("meta"):
        module = wrap(make_start(case), "fsdp")
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(torch.nan)
    # Seeds that differ, as some loops set them for dropout.
    return reset(module, seed=rank)


def edges() -> nn.Module:
    """Two processes share the first layer's coefficients evenly, and unevenly its base and the
    second's coefficients; of the second's base one of them has nothing."""
    torch.manual_seed(0)
    return nn.Sequential(KANLinear(6, 5, basis=BSpline()), KANLinear(5, 1, basis=BSpline()))


def muon_steps(module: nn.Module) -> dict[str, Tensor]:
    """Parameters after a few of its steps along gradients that are drawn."""
    settings = OptimizerSettings(kind="muon", muon_coefficients=True, learning_rate=0.01)
    optimizer = build_optimizer(module, settings)
    torch.manual_seed(1)
    for _ in range(STEPS):
        for parameter in module.parameters():
            gradient = torch.randn(parameter.shape)
            if isinstance(parameter, DTensor):
                placed = parameter.device_mesh, parameter.placements
                gradient = distribute_tensor(gradient, *placed)
            parameter.grad = gradient
        optimizer.step()
    return {name: whole(parameter) for name, parameter in module.named_parameters()}


def sharded_process(rank: int, folder: Path) -> None:
    """Start every case and take steps of Muon, and write what came of it."""
    with joined(rank, folder):
        found = {case: sharded_start(case, rank) for case in [*STARTS, MODEL]}
        found["muon"] = muon_steps(wrap(edges(), "fsdp"))
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("sharded")
    spawn(sharded_process, (folder,), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("case", [*STARTS, MODEL])
def test_sharded_parameters_start_as_whole_ones(sharded: list, case: str) -> None:
    """With the numbers of the first process's seed."""
    expected = reset(make_start(case), seed=0)
    for found in sharded:
        torch.testing.assert_close(found[case], expected, rtol=0, atol=0)


def test_muon_moves_sharded_parameters_as_whole_ones(sharded: list) -> None:
    """Exactly, although it narrows to bfloat16: each process computes with whole matrices."""
    expected = muon_steps(edges())
    for found in sharded:
        torch.testing.assert_close(found["muon"], expected, rtol=0, atol=0)
