"""`kanlm plan`: whether a job fits, how long it takes, and what would make it fit.

Time is operations over the device's peak times a utilisation that the user states. The
default is a guess on the careful side: Llama 3 reports 38 to 43% of the bfloat16 peak on
H100s (arXiv 2407.21783, table 4) for models far wider than most that are trained here, and
small or eager ones reach a few percent. `mfu` in the metrics of a run of one's own is the
number to put here.
"""

import bisect
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from kanlm.config import Config
from kanlm.data.corpus import open_tokenizer
from kanlm.data.tokenizer import vocabulary_size
from kanlm.errors import UserError
from kanlm.experiments import study
from kanlm.experiments.planning.memory import LAYOUTS, RESERVE, Layout, Memory, cache_bytes, memory
from kanlm.model import KanLMConfig
from kanlm.model.accounting import Accounting, account
from kanlm.reporting.format import count, duration
from kanlm.reporting.table import Table, print_table
from kanlm.slow_notices import announce_if_slow
from kanlm.training.gpus import GPU, gpu
from kanlm.training.resolve import count_parameters


@dataclass(frozen=True)
class Devices:
    """What the job is to run on.

    Raises:
        UserError: a number is out of its range, or the GPU is not in the table.
    """

    #: Of `kanlm.training.gpus.GPUS`.
    name: str
    count: int
    #: In one machine.
    node: int = 8
    #: Share of the peak that training reaches.
    utilisation: float = 0.3

    def __post_init__(self) -> None:
        gpu(self.name)
        if self.count < 1 or self.node < 1:
            raise UserError(f"{self.count} GPUs, {self.node} a machine: expected at least 1")
        if self.count > self.node and self.count % self.node:
            raise UserError(
                f"--gpus {self.count}: expected a multiple of the {self.node} of a machine; "
                "--gpus-per-node says how many that are"
            )
        if not 0 < self.utilisation <= 1:
            raise UserError(f"--utilisation {self.utilisation}: expected more than 0, at most 1")

    @property
    def gpu(self) -> GPU:
        return gpu(self.name)

    @property
    def usable_bytes(self) -> float:
        return self.gpu.memory_bytes * (1 - RESERVE)


@dataclass(frozen=True)
class Plan:
    """One training job on some devices."""

    devices: Devices
    layout: Layout
    #: By every layout that these devices can have.
    memory: dict[Layout, Memory]
    #: Keys and values of one sequence of the context's length.
    cache_bytes: int
    accounting: Accounting
    #: Of the model: what utilisation is a share of.
    flops_per_step: float
    #: With what is computed twice.
    executed_flops_per_step: float
    tokens_per_step: int
    steps: int
    seconds_per_step: float
    #: Settings to lay over the config, each with the memory of its peak.
    remedies: dict[str, int]

    @property
    def fits(self) -> bool:
        return self.memory[self.layout].peak <= self.devices.usable_bytes


def plan(config: Config, devices: Devices) -> Plan:
    """Plan a resolved configuration.

    Raises:
        UserError: the GPU is unknown, its peak at the precision is, the batch does not divide
            among the devices, or these cannot hold the weights or the inputs of one layer.
    """
    training = config.training
    peak = devices.gpu.peak(training.precision, tf32=bool(training.tf32))
    if peak is None:
        raise UserError(
            f"training.precision = {training.precision}: the table has no peak of {devices.name} "
            "at it; expected fp32 or bf16"
        )
    if training.batch_size % devices.count:
        raise UserError(
            f"training.batch_size = {training.batch_size} does not divide among "
            f"{devices.count} GPUs"
        )
    _check_sizes(config, devices)
    vocab_size = config.model.vocab_size or vocabulary_size(
        open_tokenizer(config.tokenizer, config.data)
    )
    accounting = account(config.model, vocab_size)
    layouts = list(_layouts(devices))
    chosen: Layout = LAYOUTS[training.sharding] if devices.count > 1 else "one device"
    if chosen not in layouts:
        raise UserError(
            f"training.sharding = {training.sharding}: {devices.count} GPUs in machines of "
            f"{devices.node} are one machine; expected none or full"
        )
    held: dict[Layout, Memory] = {
        layout: _memory(config, vocab_size, layout, devices) for layout in layouts
    }
    tokens = training.batch_size * config.model.context_length
    flops = tokens * accounting.training_flops_per_token
    executed = flops
    if training.activation_checkpointing:
        executed += tokens * accounting.recomputed_flops_per_token
    remedies = {}
    if held[chosen].peak > devices.usable_bytes:
        remedies = _remedies(config, vocab_size, devices, held[chosen].peak)
    return Plan(
        devices=devices,
        layout=chosen,
        memory=held,
        cache_bytes=cache_bytes(
            KanLMConfig.from_settings(config.model, vocab_size), config.model.context_length
        ),
        accounting=accounting,
        flops_per_step=flops,
        executed_flops_per_step=executed,
        tokens_per_step=tokens,
        steps=training.steps,
        seconds_per_step=executed / (devices.count * peak * devices.utilisation),
        remedies=remedies,
    )


def _check_sizes(config: Config, devices: Devices) -> None:
    """Say what cannot fit whatever is changed, before a step of it is traced."""
    # A vocabulary that the tokenizer will state is at least this large.
    parameters = count_parameters(config.model, config.model.vocab_size or 2)
    weights, held = 4 * parameters, devices.count * devices.usable_bytes
    if weights > held:
        raise UserError(
            f"does not fit: {count(parameters)} parameters are {_bytes(weights)} of weights, and "
            f"{devices.count} × {devices.name} hold {_bytes(held)}"
        )
    stream = _stream_bytes(config, _rows(config, devices))
    if stream > devices.usable_bytes:
        raise UserError(
            f"does not fit: the inputs of one layer are {_bytes(stream)} in one pass, and "
            f"{devices.name} holds {_bytes(devices.usable_bytes)}; set training.micro_batch_size"
        )


def _rows(config: Config, devices: Devices) -> int:
    """Return the sequences in one forward pass of one device."""
    rows = config.training.batch_size // devices.count
    return min(config.training.micro_batch_size or rows, rows)


def _stream_bytes(config: Config, rows: int) -> int:
    """Return the least that a pass holds: the residual stream at one place."""
    return 4 * rows * config.model.context_length * config.model.d_model


def _layouts(devices: Devices) -> Iterator[Layout]:
    if devices.count == 1:
        yield "one device"
        return
    yield "DDP"
    yield "FSDP2 full"
    if devices.count > devices.node:
        yield "FSDP2 hybrid"


def _memory(config: Config, vocab_size: int, layout: Layout, devices: Devices) -> Memory:
    rows = _rows(config, devices)
    with announce_if_slow(f"tracing a step of {rows:,} sequences without memory", _to_terminal):
        return memory(config, vocab_size, layout, devices=devices.count, node_devices=devices.node)


def _to_terminal(line: str) -> None:
    print(line, file=sys.stderr)


def _remedies(config: Config, vocab_size: int, devices: Devices, now: int) -> dict[str, int]:
    """Try changes that need less memory, one by one and then one after another until it fits."""
    changes: dict[str, dict[str, object]] = {}
    training = config.training
    rows, micro = training.batch_size // devices.count, _rows(config, devices)
    if training.precision == "fp32":
        changes["training.precision=bf16"] = {"precision": "bf16"}
    if not training.activation_checkpointing:
        changes["training.activation_checkpointing=true"] = {"activation_checkpointing": True}
    if training.sharding == "none" and devices.count > 1:
        changes["training.sharding=full"] = {"sharding": "full"}

    def peak(change: dict[str, object]) -> int:
        changed = replace(config, training=replace(training, **change))  # type: ignore[arg-type]
        layout = LAYOUTS[changed.training.sharding] if devices.count > 1 else "one device"
        return _memory(changed, vocab_size, layout, devices).peak

    if (size := _largest_fitting(_smaller_divisors(rows, micro), peak, devices)) is not None:
        changes = {f"training.micro_batch_size={size}": {"micro_batch_size": size}, **changes}
    found = {name: needed for name, change in changes.items() if (needed := peak(change)) < now}
    if not any(needed <= devices.usable_bytes for needed in found.values()) and len(found) > 1:
        together = {key: value for name in found for key, value in changes[name].items()}
        found[" ".join(found)] = peak(together)
    return found


def _smaller_divisors(rows: int, below: int) -> list[int]:
    """Return the divisors of `rows` that are less than `below`, in order."""
    low = [size for size in range(1, math.isqrt(rows) + 1) if rows % size == 0]
    return sorted(size for size in {*low, *(rows // size for size in low)} if size < below)


def _largest_fitting(
    sizes: list[int], peak: Callable[[dict[str, object]], int], devices: Devices
) -> int | None:
    """Return the largest micro-batch that fits, or else the smallest; None where there is none."""
    if not sizes:
        return None
    # Memory grows with the micro-batch, and a trace of each would take minutes.
    count = bisect.bisect_right(
        sizes, devices.usable_bytes, key=lambda size: peak({"micro_batch_size": size})
    )
    return sizes[max(count - 1, 0)]


def print_plans(config: Config, devices: Devices) -> None:
    """Print the plan of a run, or of every arm of a study.

    Raises:
        UserError: see `plan`, or of `kanlm.experiments.study.plan`.
    """
    if config.study is None:
        print_plan(plan(config, devices), config.output_dir)
        return
    for arm in study.plan(config):
        print_plan(plan(arm.config, devices), arm.name)


def print_plan(plan: Plan, title: str) -> None:
    """Print the memory of every layout, operations and time, and what to change."""
    devices = plan.devices
    print_table(_memory_table(plan, title))
    executed = ""
    if plan.executed_flops_per_step > plan.flops_per_step:
        executed = f" ({count(plan.executed_flops_per_step)} with what is computed twice)"
    seconds = plan.seconds_per_step * plan.steps
    print(
        f"\n{plan.accounting.feed_forward}, "
        f"{count(plan.accounting.parameters['total'])} parameters; "
        f"{count(plan.tokens_per_step)} tokens and {count(plan.flops_per_step)} FLOPs a step"
        f"{executed}, {count(plan.tokens_per_step * plan.steps)} tokens and "
        f"{count(plan.flops_per_step * plan.steps)} FLOPs in {plan.steps:,} steps\n"
        f"at a utilisation of {devices.utilisation:g}: {duration(plan.seconds_per_step)} a step, "
        f"{count(plan.tokens_per_step / plan.seconds_per_step)} tokens/s, {duration(seconds)} "
        f"in all; evaluation, samples and checkpoints come on top\n"
        f"keys and values of one sequence of the context's length in generation: "
        f"{_bytes(plan.cache_bytes)}"
    )
    if plan.fits:
        print(f"fits: {_bytes(plan.memory[plan.layout].peak)} of {_bytes(devices.usable_bytes)}")
        return
    print(
        f"does not fit: {_bytes(plan.memory[plan.layout].peak)} of "
        f"{_bytes(devices.usable_bytes)}" + ("; try" if plan.remedies else ", whatever is changed")
    )
    for change, needed in plan.remedies.items():
        fits = "fits" if needed <= devices.usable_bytes else "still too much"
        print(f"  {change}: {_bytes(needed)}, {fits}")


def _memory_table(plan: Plan, title: str) -> Table:
    layouts = list(plan.memory)
    parts = list(
        dict.fromkeys(part for held in plan.memory.values() for part in held.activation_parts)
    )

    def row(name: str, value: Callable[[Memory], int]) -> list[str]:
        return [name, *(_bytes(value(held)) for held in plan.memory.values())]

    rows = [
        row("parameters", lambda m: m.parameters),
        row("gradients", lambda m: m.gradients),
        row("optimizer state", lambda m: m.optimizer),
        row("activations", lambda m: m.activations),
        *(row(f"  {part}", lambda m, part=part: m.activation_parts.get(part, 0)) for part in parts),
        row("copies", lambda m: m.copies),
        row("peak", lambda m: m.peak),
    ]
    devices = plan.devices
    return Table(
        title=f"{title}: memory of each of {devices.count} × {devices.name}",
        columns=["", *(f"{each} *" if each == plan.layout else each for each in layouts)],
        rows=rows,
        rules=[len(rows) - 1],
        note=(
            f"* as the config says. Of {_bytes(devices.gpu.memory_bytes)} a share of "
            f"{RESERVE:g} is left to CUDA, NCCL and gaps. Each part when it is largest; copies "
            "are buckets of gradients, gathered parameters and casts. Eager torch. "
            f"{devices.gpu.source}."
        ),
    )


def _bytes(value: float) -> str:
    return count(value, "B")
