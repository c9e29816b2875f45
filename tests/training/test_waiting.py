"""What a training step does not do: wait for the device more than once, and keep memory.

Both are counted, so a CPU shows what would cost a GPU its lead.
"""

import gc
import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kanlm.config import Config, from_tree, merge, to_tree
from kanlm.model.documents import document_numbers, flex_mask
from kanlm.training import run as runs
from kanlm.training.callbacks import Callback
from kanlm.training.resolve import resolve
from kanlm.training.trainer import Trainer

#: Operators that return numbers or shapes to the host.
WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_dim",
}
#: Methods that read memory without an operator where it is the host's.
READING = ("cpu", "numpy", "tolist")


class Waits(TorchDispatchMode):
    """Counts what waits for the device."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indexed = name == "index" and any(i.dtype == torch.bool for i in args[1] if i is not None)
        if name in WAITING or indexed:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Counting(Callback):
    """Counts what waits for the device in each step, from its beginning to its end."""

    def __init__(self) -> None:
        self.counted: list[Counter[str]] = []
        self.stack = ExitStack()

    def before_step(self) -> None:
        counts: Counter[str] = Counter()
        patch = self.stack.enter_context(pytest.MonkeyPatch.context())
        for name in READING:
            method = getattr(torch.Tensor, name)

            def counting(
                tensor: torch.Tensor, *args: Any, name: str = name, method: Any = method
            ) -> Any:
                counts[name] += 1
                return method(tensor, *args)

            patch.setattr(torch.Tensor, name, counting)
        self.stack.enter_context(Waits(counts))
        self.counted.append(counts)

    def after_step(self) -> None:
        self.stack.close()


def changed(config: Config, **parts: Any) -> Config:
    return resolve(from_tree(merge(to_tree(config), parts)))


@pytest.mark.parametrize(
    ("settings", "part", "more"),
    [
        ("config", {"penalties": {"l1": 1e-3}, "training": {"micro_batch_size": 2}}, {}),
        ("config", {"model": {"feed_forward": "kan-local"}, "optimizer": {"kind": "muon"}}, {}),
        ("routed", {}, {}),
        # On a CPU, where documents start is looked up in its own memory.
        ("config", {"data": {"attention_within_documents": True}}, {"numpy": 1}),
    ],
    ids=["kan", "kan-local", "moe", "documents"],
)
def test_a_step_waits_for_the_device_once(
    request: pytest.FixtureRequest,
    settings: str,
    part: dict,
    more: dict[str, int],
) -> None:
    """For the loss and norm by which it decides whether to be taken, and for nothing else."""
    config = changed(request.getfixturevalue(settings), **part)
    last = config.training.steps
    config = changed(config, training={"log_every": last, "evaluate_every": last})
    counting = Counting()
    runs.run(config, callbacks=[counting])
    # The first may set up what the others use, and the last is logged.
    assert counting.counted[1:-1] == [{"tolist": 1, **more}] * (config.training.steps - 2)


def test_on_a_gpu_documents_are_kept_apart_without_waiting() -> None:
    counts: Counter[str] = Counter()
    positions = torch.cat([torch.arange(130), torch.arange(70)]).expand(2, -1)
    with Waits(counts):
        flex_mask(document_numbers(positions))
    assert not counts


@pytest.mark.parametrize("settings", ["config", "routed"])
def test_tensors_do_not_pile_up(request: pytest.FixtureRequest, at, settings: str) -> None:
    config = changed(request.getfixturevalue(settings), training={"steps": 36})
    found: dict[int, tuple[int, int]] = {}

    def count(trainer: Trainer) -> None:
        # Every kind of line has been written, and checkpoints have been.
        gc.collect()
        # Tests that compiled leave tensors without storage behind, of other types.
        real = (torch.Tensor, torch.nn.Parameter)
        tensors = [thing for thing in gc.get_objects() if type(thing) in real]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        size = sum(storage.nbytes() for storage in storages.values())
        found[trainer.state.step] = len(tensors), size

    runs.run(config, callbacks=[at({12, 24, 36}, count, "after_step")])
    assert found[12] == found[24] == found[36]


def test_a_line_says_how_long_compiling_took(config: Config, tmp_path: Path) -> None:
    runs.run(changed(config, training={"steps": 3}))
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {x["compile_seconds"] for x in lines if x["kind"] == "train"} == {0.0}
