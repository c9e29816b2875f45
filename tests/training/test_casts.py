"""How often a step in bfloat16 casts weights, counted as operators."""

from collections import Counter
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from kanlm.config import Config, from_tree, merge, to_tree
from kanlm.training import run as runs
from kanlm.training.resolve import resolve
from kanlm.training.trainer import Trainer


class Casts(TorchDispatchMode):
    """Counts what is narrowed to bfloat16, by number of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        source = {"_to_copy": 0, "copy_": 1}.get(name)
        if source is not None and out.dtype == torch.bfloat16 != args[source].dtype:
            self.sizes[out.numel()] += 1
        return out


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["gelu", "kan", "kan-local"])
def test_a_step_casts_each_matrix_once(
    config: Config, monkeypatch: pytest.MonkeyPatch, kind: str, checkpointing: bool
) -> None:
    """Over all micro-batches, in forward, in backward and where blocks are computed again."""
    training = {
        "steps": 2,
        "batch_size": 4,
        "micro_batch_size": 1,
        "precision": "bf16",
        "activation_checkpointing": checkpointing,
        "evaluate_every": None,
    }
    # Sizes that are no activation's.
    model = {"d_model": 36, "context_length": 10, "feed_forward": kind, "tie_embeddings": False}
    parts = {"training": training, "model": model, "generation": {"max_new_tokens": 1}}
    changed = resolve(from_tree(merge(to_tree(config), parts)))
    step, seen, matrices = Trainer.train_step, Casts(), Counter()

    def counted(trainer: Trainer) -> None:
        if trainer.state.step == 0:
            for name, parameter in trainer.bare_model.named_parameters():
                if parameter.ndim == 1 or "embed_tokens" in name or "base_weight" in name:
                    continue
                size = parameter.numel()
                if kind == "kan-local" and "coefficients" in name:
                    # One matrix with the base's weights.
                    size += size // parameter.shape[1]
                matrices[size] += 1
            with seen:
                step(trainer)
        else:
            step(trainer)

    monkeypatch.setattr(Trainer, "train_step", counted)
    AcceleratorState._reset_state()
    runs.run(changed)
    AcceleratorState._reset_state()
    assert {size: seen.sizes[size] for size in matrices} == matrices
