"""Activation checkpointing: memory for time (Chen et al., arXiv 1604.06174).

A decoder block keeps its inputs alone and computes the rest again in backward, exactly: its
random numbers are drawn as before. That costs another forward pass of the blocks, a third
of a step's operations.
"""

from functools import partial

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


def recompute_blocks(model: PreTrainedModel) -> None:
    """Checkpoint every decoder block of the model while it trains."""
    # Without the hook on the embedding that transformers' public method adds for adapters.
    model._set_gradient_checkpointing(
        enable=True, gradient_checkpointing_func=partial(checkpoint, use_reentrant=False)
    )
