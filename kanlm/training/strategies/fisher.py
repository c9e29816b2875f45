"""The diagonal of the Fisher information, from squared gradients sequence by sequence."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kanlm.training.callbacks import Batch

if TYPE_CHECKING:
    from kanlm.training.trainer import Trainer


def fisher_diagonal(trainer: "Trainer", rows: Iterable[Batch]) -> dict[str, Tensor]:
    """Mean over sequences of the squared gradient of a sequence's loss, in (nats per token)².

    This is the empirical Fisher information: labels are those of the text, not drawn from the
    model (Kunstner et al., arXiv 1905.12558). Dropout is off. All ranks compute the gradient of
    the same sequence, so that each gradient is of one sequence however parameters are placed.

    Args:
        rows: batches of one sequence, the same on all ranks.

    Returns:
        name of each parameter → a tensor of its shape and placement.
    """
    model = trainer.model
    parameters = dict(model.named_parameters())
    found = {name: torch.zeros_like(p.detach()) for name, p in parameters.items()}
    count = 0
    was_training = model.training
    model.eval()
    try:
        for each in rows:
            trainer.compute_gradients(each)
            count += 1
            for name, parameter in model.named_parameters():
                # An expert that no token chose has none.
                if parameter.grad is not None:
                    found[name] += parameter.grad.square()
                parameter.grad = None
    finally:
        model.train(was_training)
    return {name: total / count for name, total in found.items()}
