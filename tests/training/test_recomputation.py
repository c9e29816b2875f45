"""Activation checkpointing changes memory, and no number."""

import pytest
import torch
from torch import Tensor

from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.training.compilation import recompute_blocks


def step(kind: str, recomputed: bool) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss and gradients of a batch with dropout, and bytes that were kept for backward."""
    torch.manual_seed(0)
    model = KanLMForCausalLM(
        KanLMConfig(
            vocab_size=11,
            d_model=16,
            n_layers=3,
            n_heads=2,
            context_length=32,
            dropout=0.2,
            feed_forward={"kind": kind},
        )
    )
    if recomputed:
        recompute_blocks(model)
    tokens = torch.randint(11, (4, 32))
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, sum(kept.values())


@pytest.mark.parametrize("kind", ["swiglu", "kan", "kan-local", "moe"])
def test_numbers_are_the_same_and_less_is_kept(kind: str):
    loss, gradients, kept = step(kind, recomputed=False)
    again, recomputed, less = step(kind, recomputed=True)
    assert torch.equal(loss, again)
    assert gradients.keys() == recomputed.keys()
    assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients)
    assert less < kept / 2
