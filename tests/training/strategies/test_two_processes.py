"""Every strategy computes in two gloo processes, by DDP and by FSDP2, what it does in one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kanlm.config import Config
from kanlm.training import run as runs
from kanlm.training.strategies import STRATEGIES
from tests.training.test_sharding import run_in

#: With options by which each changes the few steps; of masks and matrices one has a control.
SPECS: list[dict[str, Any]] = [
    {"kind": "replay", "fraction": 0.3},
    {"kind": "l2sp", "weight": 10.0},
    {"kind": "ewc", "weight": 1e3, "sequences": 3},
    {"kind": "distillation"},
    {"kind": "feed-forward-only"},
    {"kind": "attention-only"},
    {"kind": "interpolation"},
    {"kind": "occupancy-mask", "threshold": 0.05, "sequences": 8},
    {"kind": "occupancy-scaling", "sequences": 8, "rest": "freeze"},
    {"kind": "tf-idf", "sequences": 8, "control": "permuted"},
    {"kind": "occupancy-penalty", "weight": 1e2, "sequences": 8},
    {"kind": "banded", "weight": 1e2, "sequences": 8, "control": "random"},
    {"kind": "input-covariance", "weight": 1e2, "sequences": 8},
    {"kind": "joint"},
    {"kind": "continue-on-base"},
    {"kind": "frozen"},
]
#: Those that keep or compute with tensors in a way of their own.
QUICK = ("ewc", "occupancy-mask")


def tensors(folder: str | Path, name: str) -> dict[str, torch.Tensor]:
    """Those of a run's folder, the parts of ranks one after the other."""
    files = [load_file(path) for path in sorted((Path(folder) / name).glob("*.safetensors"))]
    names = {key for file in files for key in file}
    return {key: torch.cat([f[key] for f in files if key in f]).double() for key in names}


def test_all_are_there():
    assert {"plain", *(spec["kind"] for spec in SPECS)} == STRATEGIES.keys()


@pytest.mark.parametrize(
    ("sharding", "kinds"),
    [
        ("full", QUICK),
        pytest.param("full", tuple(STRATEGIES), marks=pytest.mark.slow),
        pytest.param("none", tuple(STRATEGIES), marks=pytest.mark.slow),
    ],
    ids=["fsdp2-some", "fsdp2", "ddp"],
)
def test_two_processes_compute_what_one_does_and_resume(
    tuned, sharding: str, kinds: tuple[str, ...]
):
    """All are stopped and resumed; the model, and what is left to a next run, are alike."""

    def make(spec: dict[str, Any], name: str, sharding: str) -> Config:
        base = "gelu" if spec["kind"] == "input-covariance" else "kan-local"
        training = {"steps": 4, "evaluate_every": None, "precision": "fp64", "sharding": sharding}
        # Adam divides a gradient by its own size, whatever cancelled in it.
        optimizer = {"learning_rate": 1e-2, "epsilon": 1e-5}
        return tuned(
            spec,
            f"{spec['kind']}-{name}",
            base,
            model={"dropout": 0.0},
            training=training,
            optimizer=optimizer,
        )

    specs = [spec for spec in SPECS if spec["kind"] in kinds]
    two = [make(spec, "two", sharding) for spec in specs]
    alone = [make(spec, "one", "none") for spec in specs]
    for config in alone:
        runs.run(config)
    run_in(2, two, interrupt_at=1)
    assert not any((Path(config.output_dir) / "model").exists() for config in two)
    run_in(2, two)
    for one, other in zip(alone, two, strict=True):
        for name in ("model", "callbacks"):
            ours, theirs = (tensors(config.output_dir, name) for config in (other, one))
            assert ours.keys() == theirs.keys()
            for key, tensor in ours.items():
                torch.testing.assert_close(
                    tensor, theirs[key], rtol=0, atol=1e-8, msg=f"{one.strategy['kind']} {key}"
                )
