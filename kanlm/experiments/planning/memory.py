"""Bytes that one device of a training job holds, part by part.

Parameters, gradients and optimizer state are counted from the model's shapes, activations
by `tracing`. What the layouts add is counted from what they are known to allocate:

- DDP all-reduces gradients in buckets that are as large as all gradients together;
- FSDP2 gathers a decoder block's parameters around its forward and backward passes, the
  next block's at the same time, and makes whole gradients of a block; embedding, last
  norm and head are together all through the step.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import nn

from kanlm.config import Config, OptimizerSettings
from kanlm.experiments.planning.tracing import Step, trace_step
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.decoder import KanLMDecoderLayer
from kanlm.training.optimizer import parameter_groups

Layout = Literal["one device", "DDP", "FSDP2 full", "FSDP2 hybrid"]

#: What the settings ask for, by what it is called in plans.
LAYOUTS: dict[str, Layout] = {"none": "DDP", "full": "FSDP2 full", "hybrid": "FSDP2 hybrid"}

#: Part of a device's memory that a plan leaves free: what CUDA and NCCL take for themselves,
#: and gaps between blocks. An estimate that was not measured.
RESERVE = 0.08


@dataclass(frozen=True)
class Memory:
    """Bytes of one device in training, each part when it is largest."""

    parameters: int
    gradients: int
    optimizer: int
    #: Of forward and backward, with what is made for a moment.
    activations: int
    #: Buckets, gathered parameters and their gradients, parameters in another dtype.
    copies: int
    #: All together when a step holds most: less than the sum where gradients come as
    #: activations go.
    peak: int
    #: Activations by the part of the model that made them.
    activation_parts: Mapping[str, int]


def memory(
    config: Config, vocab_size: int, layout: Layout, *, devices: int, node_devices: int
) -> Memory:
    """Estimate what one of `devices` holds in training.

    Args:
        config: resolved; its batch must divide among the devices.
        node_devices: devices of one machine, among which a hybrid shards.
    """
    model_config = KanLMConfig.from_settings(config.model, vocab_size)
    training = config.training
    rows = training.batch_size // devices
    micro = min(training.micro_batch_size or rows, rows)
    step = _traced(
        _Frozen(model_config),
        micro,
        -(-rows // micro),
        training.precision,
        training.activation_checkpointing,
    )
    model = _without_memory(model_config, training.precision)
    states = _optimizer_states(model, config.optimizer)
    sharded = layout.startswith("FSDP2")
    shards = 1 if not sharded else node_devices if layout == "FSDP2 hybrid" else devices
    parameters = _bytes(model.parameters(), shards)
    optimizer = _bytes(model.parameters(), shards, states)
    if sharded:
        buckets, gathered = 0, _gathered(model)
        copies = gathered + step.casts
        passes = step.peak(1 / shards) + gathered
    else:
        buckets = parameters if layout == "DDP" else 0
        copies = buckets + step.casts
        passes = step.peak() + buckets
    # Log lines tell the size of an update, from a copy of the parameters before it.
    update = 2 * parameters + buckets
    return Memory(
        parameters=parameters,
        gradients=parameters,
        optimizer=optimizer,
        activations=step.activations,
        copies=copies,
        peak=parameters + optimizer + max(passes, update),
        activation_parts=step.activation_parts,
    )


def cache_bytes(model: KanLMConfig, length: int, dtype: torch.dtype = torch.float32) -> int:
    """Count bytes of keys and values of one sequence of `length` tokens in generation."""
    head = model.d_model // model.n_heads
    return 2 * model.n_layers * model.num_key_value_heads * head * length * dtype.itemsize


def _gathered(model: KanLMForCausalLM) -> int:
    """Count bytes that FSDP2 holds beside shards and activations.

    Whole parameters of what is outside the blocks and of two blocks, and whole gradients of
    one, which come as its activations go.
    """
    blocks = [m for m in model.modules() if isinstance(m, KanLMDecoderLayer)]
    inside = {p for block in blocks for p in block.parameters()}
    root = _bytes((p for p in model.parameters() if p not in inside), 1)
    largest = max(_bytes(block.parameters(), 1) for block in blocks)
    return root + 3 * largest


def _optimizer_states(model: nn.Module, settings: OptimizerSettings) -> dict[nn.Parameter, int]:
    """Count the tensors of its shape that the optimizer keeps of each parameter."""
    moments = {"adamw": 2, "muon": 1}
    return {
        parameter: moments[group["algorithm"]]
        for group in parameter_groups(model, settings)
        for parameter in group["params"]
    }


def _bytes(
    parameters: Iterable[nn.Parameter],
    shards: int,
    times: Mapping[nn.Parameter, int] | None = None,
) -> int:
    """Count bytes of the first shard, where the first dimension is split into `shards`."""
    total = 0
    for parameter in parameters:
        rows = math.ceil(parameter.shape[0] / shards)
        size = rows * math.prod(parameter.shape[1:]) * parameter.dtype.itemsize
        total += size * (1 if times is None else times[parameter])
    return total


def _without_memory(config: KanLMConfig, precision: str) -> KanLMForCausalLM:
    with torch.device("meta"):
        model = KanLMForCausalLM(config)
    return model.double() if precision == "fp64" else model


class _Frozen:
    """A model's configuration as a key: two of equal settings are the same."""

    def __init__(self, config: KanLMConfig) -> None:
        self.config = config
        self.text = config.to_json_string(use_diff=False)

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Frozen) and self.text == other.text


@lru_cache(maxsize=64)
def _traced(
    model: _Frozen, rows: int, micro_batches: int, precision: str, recomputed: bool
) -> Step:
    """Call `trace_step`, once for what layouts have in common."""
    return trace_step(
        model.config,
        rows=rows,
        micro_batches=min(micro_batches, 2),
        precision=precision,
        activation_checkpointing=recomputed,
    )
