"""Distillation to the base model, on new text."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kanlm.config.schema.types import NonNegativeFloat
from kanlm.data.loader import IGNORED
from kanlm.training.callbacks import Batch
from kanlm.training.strategies.base import Anchored

if TYPE_CHECKING:
    from kanlm.training.checkpointing.callback_state import PreviousState


class Distillation(Anchored):
    """Adds weight · KL(p_0 ‖ p) to the loss, p_0 being the base model's distribution.

    A mean over the tokens of the new text (learning without forgetting: Li & Hoiem,
    arXiv 1606.09282). The teacher is the base run's model without dropout, whole on every rank.

    Args:
        weight: λ of the divergence.
    """

    name = "distillation"
    needs_logits = True
    compares_parameters = False

    def __init__(self, *, weight: NonNegativeFloat = 1.0) -> None:
        self.weight = weight

    def start(self, previous: "PreviousState | None") -> None:
        """Read the teacher; no copy of θ0 is kept beside it."""
        # It reads settings, which know the strategies.
        from kanlm.training.checkpointing.export import load_trained

        super().start(previous)
        self.anchors = {}
        trainer = self.trainer
        assert trainer.config.initialize_from is not None
        # The model that is trained drops out what it would without a teacher.
        with torch.random.fork_rng(devices=[]):
            teacher = load_trained(Path(trainer.config.initialize_from), dropout=0.0)
        teacher.requires_grad_(False)
        first = next(trainer.model.parameters())
        self.teacher = teacher.to(trainer.accelerator.device, first.dtype).eval()

    def loss(self, batch: Batch, outputs: Any) -> Tensor:
        """λ KL(p_0 ‖ p), a mean over the micro-batch's tokens."""
        wanted = batch["shift_labels"] != IGNORED
        inputs = {key: value for key, value in batch.items() if key != "shift_labels"}
        with torch.no_grad():
            theirs = self.teacher(**inputs, use_cache=False).logits[wanted]
        ours = outputs.logits[wanted]
        wide = torch.promote_types(ours.dtype, torch.float32)
        divergence = F.kl_div(
            ours.to(wide).log_softmax(-1),
            theirs.to(wide).log_softmax(-1),
            log_target=True,
            reduction="sum",
        )
        return self.weight * divergence / wanted.sum().clamp(min=1)
