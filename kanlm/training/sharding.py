"""Where parameters live: whole in every process (DDP), or each with a part (FSDP2).

One seam, because Accelerate chooses FSDP for accelerators only: with processes on CPUs it
stays with DDP and says nothing. There torch's own `fully_shard` does what Accelerate calls
on GPUs, so that all of this is tested without one. A decoder block is a unit of its own, and
what is outside the blocks another.

Whatever needs whole parameters (the exported model, grids that change shape) asks for
`gathered_copy`: an ordinary model and optimizer, made of all parts. Checkpoints do not.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin, ParallelismConfig
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from kanlm.errors import UserError
from kanlm.kan.sharding import gathered, split_as
from kanlm.model import KanLMForCausalLM
from kanlm.model.decoder import KanLMDecoderLayer
from kanlm.training.compilation import recompute_blocks

#: Makes the optimizer over a model's parameters.
Build = Callable[[nn.Module], torch.optim.Optimizer]


def accelerator_options(sharding: str) -> dict[str, Any]:
    """What `Accelerator` must be given on GPUs for `training.sharding`.

    `none` leaves the choice to Accelerate's configuration.

    Raises:
        UserError: `hybrid`, and the processes are not on several machines.
    """
    world, local = _processes(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if sharding == "hybrid" and (local == 1 or world % local or world == local):
        raise UserError(
            f"training.sharding = hybrid: {world} processes, {local} on this machine; expected "
            "several machines with equally many processes, more than one each"
        )
    if sharding == "none" or world == 1 or not torch.accelerator.is_available():
        return {}
    options: dict[str, Any] = {"fsdp_plugin": fsdp_plugin()}
    if sharding == "hybrid":
        options["parallelism_config"] = ParallelismConfig(
            dp_replicate_size=world // local, dp_shard_size=local
        )
    return options


def fsdp_plugin() -> FullyShardedDataParallelPlugin:
    """FSDP2 with a decoder block as unit, as Accelerate expects it."""
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[KanLMDecoderLayer.__name__],
        cpu_ram_efficient_loading=False,
    )


def check_engine(accelerator: Accelerator) -> None:
    """Refuse what Accelerate's configuration may ask for and the loop is not made for.

    Raises:
        UserError: it names DeepSpeed, Megatron or another engine, or FSDP of version 1.
    """
    kind = accelerator.distributed_type
    known = (DistributedType.NO, DistributedType.FSDP)
    if kind not in known and not kind.value.startswith("MULTI_"):
        raise UserError(
            f"Accelerate's configuration asks for {kind.value}: kanlm trains with DDP or FSDP2; "
            "set distributed_type to MULTI_GPU or FSDP"
        )
    if kind is DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError(
            "Accelerate's configuration asks for FSDP of version 1: set fsdp_version to 2, as "
            "in configs/accelerate/fsdp2.yaml"
        )


def place_on_devices(
    accelerator: Accelerator,
    model: KanLMForCausalLM,
    optimizer: torch.optim.Optimizer,
    build: Build,
    sharding: str,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Bring a whole model and its optimizer to the device and to all processes.

    Args:
        optimizer: over the model's parameters, with state or without.
        build: makes such an optimizer without state.
        sharding: as `training.sharding`.

    Returns: what to call in place of the model, and the optimizer in place of the other.
    Sharded parameters are DTensors, in the very same module.
    """
    if not uses_fsdp(accelerator, sharding):
        return accelerator.prepare(model, optimizer)
    states = {
        name: optimizer.state[parameter]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }
    if accelerator.distributed_type is DistributedType.FSDP:
        # Accelerate would gather parameters and add up gradients in bfloat16. Autocast alone
        # makes the numbers those of DDP.
        plugin = accelerator.state.fsdp_plugin
        assert plugin is not None
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
        wrapped, placed = accelerator.prepare(model, build(model))
        placed = placed.optimizer
    else:
        wrapped = _fully_shard(model.to(accelerator.device), sharding)
        placed = build(model)
    for name, parameter in model.named_parameters():
        for key, value in states.get(name, {}).items():
            alike = value.shape == parameter.shape
            part = split_as(parameter.detach(), value, alike=True) if alike else value
            placed.state[parameter][key] = part
    return wrapped, placed


def uses_fsdp(accelerator: Accelerator, sharding: str) -> bool:
    """Whether `place` gives each process a part: as asked for here or by Accelerate."""
    if accelerator.num_processes == 1:
        return False
    # As `accelerate launch` hands on its configuration; on CPUs Accelerate leaves it there.
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    return sharding != "none" or asked or accelerator.distributed_type is DistributedType.FSDP


def reshard(model: nn.Module) -> None:
    """Leave each process with its part, also of what a pass without gradients left whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered_copy(
    model: KanLMForCausalLM,
    optimizer: torch.optim.Optimizer,
    build: Build,
    *,
    device: torch.device | str,
    keep: bool = True,
) -> tuple[KanLMForCausalLM, torch.optim.Optimizer] | None:
    """The model and optimizer with all parts of all processes, which must all ask at once.

    Args:
        model: sharded.
        device: for the copy.
        keep: whether this process wants it; the others get None and hold no memory for it.
    """
    reshard(model)
    copy = _empty_copy(model, device) if keep else None
    tensors = (
        {} if copy is None else {**dict(copy.named_parameters()), **dict(copy.named_buffers())}
    )
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            whole = gathered(tensor.detach())
            if keep:
                tensors[name].copy_(whole)
                tensors[name].requires_grad_(tensor.requires_grad)
    whole_optimizer = None if copy is None else build(copy)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            whole = gathered(value)
            if whole_optimizer is not None:
                # Step counts stay on the CPU where they are.
                there = device if value.ndim else value.device
                whole_optimizer.state[tensors[name]][key] = whole.to(there, copy=True)
    if copy is None or whole_optimizer is None:
        return None
    return copy, whole_optimizer


@contextmanager
def gradient_sync(accelerator: Accelerator, wrapped: nn.Module, last: bool) -> Iterator[None]:
    """Around a micro-batch: gradients are added up over processes after the last alone.

    Sharded ones are after each, or every rank would hold all of them whole meanwhile.
    """
    now = last or isinstance(wrapped, FSDPModule)
    with nullcontext() if now else accelerator.no_sync(wrapped):
        yield


def _fully_shard(model: KanLMForCausalLM, sharding: str) -> KanLMForCausalLM:
    """Shard in place by torch's own FSDP2 over all processes."""
    world = _processes()
    device = next(model.parameters()).device.type
    if sharding == "hybrid":
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        mesh = init_device_mesh(
            device, (world // local, local), mesh_dim_names=("replicate", "shard")
        )
    else:
        mesh = init_device_mesh(device, (world,), mesh_dim_names=("shard",))
    for block in model.modules():
        if isinstance(block, KanLMDecoderLayer):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _empty_copy(model: KanLMForCausalLM, device: torch.device | str) -> KanLMForCausalLM:
    """A model of the same settings, its tensors without values yet."""
    with torch.device("meta"):
        copy = KanLMForCausalLM(model.config)
    if model.dtype == torch.float64:
        copy.double()
    copy.to_empty(device=device)
    copy.tie_weights()
    copy.train(model.training)
    if model.model.gradient_checkpointing:
        recompute_blocks(copy)
    return copy


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
