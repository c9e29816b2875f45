"""Planned memory beside what the allocator hands out in a step of a real run."""

from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from torch.profiler import ProfilerActivity, profile

from kanlm.config import Config, from_tree
from kanlm.experiments.planning.memory import memory
from kanlm.kan import plain_tensors
from kanlm.model import loss
from kanlm.training import run as runs
from kanlm.training.callbacks import Callback
from kanlm.training.resolve import resolve

#: The first step makes the optimizer's state.
MEASURED = 1
VOCAB = 257


class Measure(Callback):
    """Profiles a step; `before` are the bytes of what was there before it."""

    def __init__(self) -> None:
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.before = 0

    def before_step(self) -> None:
        if self.trainer.state.step == MEASURED:
            states = self.trainer.optimizer.state.values()
            tensors = [*self.trainer.model.parameters(), *(t for s in states for t in s.values())]
            self.before = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
            self.profiler.__enter__()

    def after_step(self) -> None:
        if self.trainer.state.step == MEASURED + 1:
            self.profiler.__exit__(None, None, None)


def measured_peak(config: Config) -> int:
    """Bytes of the allocator at its peak in a training step, what was there before included."""
    measure = Measure()
    # Another precision needs another state.
    AcceleratorState._reset_state()
    runs.run(config, callbacks=[measure])
    AcceleratorState._reset_state()
    assert measure.profiler.profiler is not None
    results = measure.profiler.profiler.kineto_results
    assert results is not None
    events = [e for e in results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak = max(peak, now)
    return measure.before + peak


CASES: dict[str, dict[str, Any]] = {
    "gelu": {"model": {"feed_forward": "gelu"}},
    "swiglu, long": {"model": {"feed_forward": "swiglu", "context_length": 256}},
    "kan, micro-batches": {"training": {"batch_size": 16, "micro_batch_size": 4}},
    "kan-local, wide": {"model": {"feed_forward": "kan-local", "d_model": 192, "n_layers": 2}},
    "kat": {"model": {"feed_forward": "kat"}},
    "moe": {"model": {"feed_forward": "moe", "n_layers": 2}},
    "kan, recomputed": {"training": {"activation_checkpointing": True}},
    "swiglu, bf16": {"model": {"feed_forward": "swiglu"}, "training": {"precision": "bf16"}},
    "kan, bf16, untied": {"model": {"tie_embeddings": False}, "training": {"precision": "bf16"}},
    # Weights stay as they were cast until the step is over.
    "kan, bf16, recomputed in micro-batches": {
        "training": {"precision": "bf16", "activation_checkpointing": True, "micro_batch_size": 4}
    },
    "gelu, logits in chunks": {"model": {"feed_forward": "gelu"}, "chunk": 128 * VOCAB * 4},
    "gelu, bf16, logits in chunks": {
        "model": {"feed_forward": "gelu", "d_model": 32, "n_layers": 1},
        "training": {"precision": "bf16"},
        "chunk": 128 * VOCAB * 4,
    },
    # Parameters are most of it, so that the peak is not at the end of forward.
    "gelu, few tokens": {
        "model": {"feed_forward": "gelu", "context_length": 16, "d_model": 128},
        "training": {"batch_size": 2},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_planned_memory_is_that_of_a_real_step_to_15_percent(
    case: str, tmp_path: Path, make_tree, monkeypatch: pytest.MonkeyPatch
):
    parts = dict(CASES[case])
    monkeypatch.setattr(loss, "CHUNK_BYTES", parts.pop("chunk", loss.CHUNK_BYTES))
    model = {"d_model": 64, "n_layers": 4, "context_length": 128, "dropout": 0.0}
    training = {"steps": 3, "batch_size": 8, "log_every": 2, "evaluate_every": None}
    tree = make_tree(
        tmp_path,
        model={**model, "feed_forward": "kan", **parts.get("model", {})},
        training={**training, "checkpoint_every": None, **parts.get("training", {})},
    )
    config = resolve(from_tree(tree))
    # Plans are for GPUs; a CPU has kernels of its own, which make less for the moment.
    monkeypatch.setattr(plain_tensors, "is_cpu_float32", lambda x: False)
    measured = measured_peak(config)
    planned = memory(config, VOCAB, "one device", devices=1, node_devices=8)
    assert planned.peak == pytest.approx(measured, rel=0.15)
    assert (
        planned.peak
        <= sum(
            getattr(planned, part)
            for part in ("parameters", "gradients", "optimizer", "activations", "copies")
        )
        + planned.parameters
    )
