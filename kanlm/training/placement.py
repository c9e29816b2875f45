"""A run's model and optimizer on their devices: one place where parameters may be replaced."""

import gc

import torch
from accelerate import Accelerator
from torch import nn

from kanlm.config import Config
from kanlm.model import KanLMForCausalLM
from kanlm.training.compilation import compile_model
from kanlm.training.optimizer import build_optimizer
from kanlm.training.sharding import gathered_copy, place_on_devices, uses_fsdp


class Placement:
    """The model and its optimizer, wrapped for all ranks.

    Args:
        model: whole, on the host, compiled as the settings say.

    Attributes:
        model: without wrappers; with FSDP its parameters are DTensors.
        wrapped_model: what to call for a forward pass that backward follows.
        wrapped_optimizer: as Accelerate has it.
        sharded: whether each rank holds a part of the parameters.
    """

    def __init__(self, config: Config, accelerator: Accelerator, model: KanLMForCausalLM) -> None:
        self.config = config
        self.accelerator = accelerator
        self.sharded = uses_fsdp(accelerator, config.training.sharding)
        self._place(model, self.build_optimizer(model))

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without wrappers."""
        return getattr(self.wrapped_optimizer, "optimizer", self.wrapped_optimizer)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """A new optimizer over a model's parameters, without state."""
        return build_optimizer(model, self.config.optimizer)

    def whole(self) -> tuple[KanLMForCausalLM, torch.optim.Optimizer]:
        """Model and optimizer with whole parameters on the device; copies where these are sharded.

        All ranks must ask at once.
        """
        if not self.sharded:
            return self.model, self.optimizer
        copies = gathered_copy(
            self.model, self.optimizer, self.build_optimizer, device=self.accelerator.device
        )
        assert copies is not None
        return copies

    def whole_model(self) -> KanLMForCausalLM | None:
        """The model with whole parameters, on the main rank; all must ask at once."""
        main = self.accelerator.is_main_process
        if not self.sharded:
            return self.model if main else None
        copies = gathered_copy(
            self.model, self.optimizer, self.build_optimizer, device="cpu", keep=main
        )
        return None if copies is None else copies[0]

    def replace(self, model: KanLMForCausalLM, optimizer: torch.optim.Optimizer) -> None:
        """Continue with this model and optimizer, whole as yet, whose shapes may be others."""
        # The old wrapper has hooks on the parameters, which go with it.
        del self.wrapped_model, self.wrapped_optimizer
        self.accelerator.free_memory()
        by_block = self.sharded
        compile_model(model, self.config.training.compile, self.accelerator, by_block=by_block)
        self._place(model, optimizer)

    def release(self) -> None:
        """Let go of the wrappers; the model remains, without them."""
        del self.wrapped_model, self.wrapped_optimizer
        self.accelerator.free_memory()
        gc.collect()

    def _place(self, model: KanLMForCausalLM, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.wrapped_model, self.wrapped_optimizer = place_on_devices(
            self.accelerator,
            model,
            optimizer,
            self.build_optimizer,
            self.config.training.sharding,
        )
