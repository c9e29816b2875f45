"""What every strategy against forgetting is."""

import hashlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from kanlm.config import Config
from kanlm.errors import UserError
from kanlm.kan.sharding import gathered
from kanlm.training.callbacks import Callback

if TYPE_CHECKING:
    from kanlm.model import KanLMForCausalLM
    from kanlm.training.checkpointing.callback_state import PreviousState
    from kanlm.training.strategies.old_text import OldText


class Strategy(Callback):
    """Base class: what a fine-tuning run does about forgetting, at the moments of a `Callback`.

    A subclass's options are the keyword-only arguments of its `__init__`, checked by their
    annotations. What it keeps from step to step is its `state_dict`, a part of checkpoints.

    Attributes:
        old_text: of the runs that this one starts from, if the class sets `reads_old_text`.
    """

    #: Whether the text of the runs that this one starts from must be at hand.
    reads_old_text: ClassVar[bool] = False
    #: Whether it compares parameters with the base run's, so that grids must stay.
    compares_parameters: ClassVar[bool] = False
    #: Whether it holds back the optimizer's updates, which `training.polish_steps` would not heed.
    limits_updates: ClassVar[bool] = False

    old_text: "OldText"

    def check(self, config: Config, model: nn.Module) -> None:
        """Check that a run and its model can take the strategy, before anything is made.

        Args:
            config: of the run.
            model: without memory, with one layer of each kind that there is.

        Raises:
            ValueError: they cannot, in a line.
        """
        training = config.training
        if self.compares_parameters and training.grid_adaptation_steps:
            raise ValueError(
                "compares coefficients with the base run's, whose meaning changes with grids: "
                "leave out training.grid_adaptation_steps"
            )
        if self.limits_updates and training.polish_steps:
            raise ValueError(
                f"training.polish_steps = {training.polish_steps} would move what the strategy "
                "holds back: leave it out"
            )

    def trains(self, name: str) -> bool:
        """Whether the parameter of that name may change at all."""
        return True

    def gradients(self, model: "KanLMForCausalLM") -> None:
        """Take the gradient from what is not to change: the optimizer passes over it then, with
        its decay, and it does not count where gradients are clipped."""
        for name, parameter in model.named_parameters():
            if not self.trains(name):
                parameter.grad = None


class Anchored(Strategy):
    """Base class of strategies that compare parameters with the base run's, θ0.

    θ0 is read from the base run's model at every start, and its checksum is in checkpoints: a
    resumed run refuses a base that has changed.

    Attributes:
        anchors: θ0 by name, placed as the parameters are.
        base_sum: checksum of θ0.
    """

    compares_parameters = True

    anchors: dict[str, Tensor]
    base_sum: str

    def start(self, previous: "PreviousState | None") -> None:
        """Copy θ0."""
        model = self.trainer.model
        self.anchors = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.base_sum = checksum(model)

    def state_dict(self) -> dict[str, Any]:
        """θ0's checksum."""
        return {"base": self.base_sum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare θ0 with that of the run's start.

        Raises:
            UserError: it is another.
        """
        if state["base"] != self.base_sum:
            raise UserError(
                f"the model in {self.trainer.config.initialize_from} is not the one that this run "
                "was started from: bring that back, or choose another output_dir"
            )


class Prepared(Anchored):
    """Base class of strategies that measure something of the base model before the first update.

    What they measure is in checkpoints, so that a resumed run does not measure it again.
    """

    prepared: bool = False

    def prepare(self) -> None:
        """Fill the tensors of the state, in place. All ranks do so at once."""
        raise NotImplementedError

    def before_step(self) -> None:
        """Prepare before the first update; the time that takes counts as training's."""
        if self.prepared:
            return
        started = time.perf_counter()
        self.prepare()
        self.prepared = True
        self.trainer.state.seconds += time.perf_counter() - started

    def state_dict(self) -> dict[str, Any]:
        """Whether the tensors have been filled, beside θ0's checksum."""
        return {**super().state_dict(), "prepared": self.prepared}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what was measured."""
        super().load_state_dict(state)
        self.prepared = state["prepared"]


def checksum(model: nn.Module) -> str:
    """The sha256 of a model's parameters in float32, whole; all ranks must ask at once."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        whole = gathered(parameter.detach()).to("cpu", torch.float32).contiguous()
        digest.update(name.encode())
        digest.update(whole.numpy().tobytes())
    return digest.hexdigest()
