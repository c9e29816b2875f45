"""How often a step in bfloat16 casts weights, counted as operators."""

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import distributed
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from kanlm.config import Config, from_tree, merge, to_tree
from kanlm.kan.casts import cast_once
from kanlm.model import KanLMConfig, KanLMForCausalLM, loss
from kanlm.training import run as runs
from kanlm.training.compilation import recompute_blocks
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
def test_a_step_casts_each_matrix_once(config: Config, at, kind: str, checkpointing: bool) -> None:
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
    seen, matrices = Casts(), Counter()

    def start(trainer: Trainer) -> None:
        for name, parameter in trainer.model.named_parameters():
            if parameter.ndim == 1 or "embed_tokens" in name or "base_weight" in name:
                continue
            size = parameter.numel()
            if kind == "kan-local" and "coefficients" in name:
                # One matrix with the base's weights.
                size += size // parameter.shape[1]
            matrices[size] += 1
        seen.__enter__()

    AcceleratorState._reset_state()
    end = at(0, lambda _: seen.__exit__(None, None, None), "after_update")
    end.name = "End"
    runs.run(changed, callbacks=[at(0, start), end])
    AcceleratorState._reset_state()
    assert {size: seen.sizes[size] for size in matrices} == matrices


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_step_have_the_bits_of_casts_in_every_pass(
    monkeypatch: pytest.MonkeyPatch, sharded: bool, checkpointing: bool
) -> None:
    monkeypatch.setattr(loss, "CHUNK_BYTES", 0)
    monkeypatch.setattr(loss, "TILE", 8)
    torch.manual_seed(0)
    kinds: list[dict[str, Any]] = [{"kind": kind} for kind in ("kan", "kan-local", "swiglu")]
    kinds.append({"kind": "moe", "num_experts": 2})
    config = KanLMConfig(vocab_size=31, d_model=16, n_heads=2, n_layers=4, feed_forward=kinds)
    model = KanLMForCausalLM(config).train()
    if checkpointing:
        recompute_blocks(model)
    if sharded:
        mesh = init_device_mesh("cpu", (1,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    ids = torch.randint(31, (3, 20))

    def gradients(once: bool) -> list[torch.Tensor]:
        model.zero_grad()
        with cast_once() if once else nullcontext():
            for row in ids.split(1):
                with torch.autocast("cpu", torch.bfloat16):
                    value = model(input_ids=row, labels=row).loss
                value.backward()
        found = [parameter.grad for parameter in model.parameters()]
        return [g.full_tensor() if isinstance(g, DTensor) else g for g in found if g is not None]

    once, apart = gradients(True), gradients(False)
    assert len(once) == len(apart) == len(list(model.parameters()))
    for mine, theirs in zip(once, apart, strict=True):
        assert mine.any()
        assert torch.equal(mine, theirs)
