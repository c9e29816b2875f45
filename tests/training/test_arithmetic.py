"""TF32 and determinism: asked for in any way, done, said, and put back."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from kanlm.config import Config, TrainingSettings
from kanlm.experiments.planning.run import Devices, plan
from kanlm.training import run as runs
from kanlm.training.arithmetic import arithmetic, tf32_is_on
from kanlm.training.gpus import GPUS
from kanlm.training.resolve import resolve

BACKENDS: Any = torch.backends
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    products, convolutions = BACKENDS.cuda.matmul, BACKENDS.cudnn.conv
    before = products.fp32_precision, convolutions.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    products.fp32_precision, convolutions.fp32_precision = before


def old_way() -> None:
    torch.set_float32_matmul_precision("high")


def new_way() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def both() -> None:
    old_way()
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    new_way()


@pytest.mark.parametrize("ask", [old_way, new_way, both])
def test_what_a_program_asked_torch_for_becomes_the_setting(ask, config: Config):
    """As resolved, so that config.yaml says what the run was made with."""
    unset = replace(config, training=replace(config.training, tf32=None))
    assert resolve(unset).training.tf32 is False
    stated = replace(config, training=replace(config.training, tf32=False))
    ask()
    assert tf32_is_on()
    assert resolve(unset).training.tf32 is True
    assert resolve(stated).training.tf32 is False


@pytest.mark.parametrize("ask", [old_way, new_way])
def test_plan_takes_the_peak_that_the_settings_allow(ask, config: Config):
    ask()
    for tf32, peak in ((True, GPUS["h100"].tf32), (False, GPUS["h100"].fp32)):
        settings = replace(config, training=replace(config.training, tf32=tf32))
        found = plan(settings, Devices("h100", 1, utilisation=1.0))
        assert found.flops_per_step / found.seconds_per_step == pytest.approx(peak)


@pytest.mark.parametrize("ask", [lambda: None, old_way, new_way])
@pytest.mark.parametrize("wanted", [False, True])
def test_a_gpu_gets_what_is_set_and_others_find_torch_as_it_was(ask, wanted: bool):
    ask()
    before = torch.backends.cuda.matmul.fp32_precision
    with arithmetic(TrainingSettings(tf32=wanted), GPU) as said:
        assert tf32_is_on() == wanted
        assert (BACKENDS.cudnn.conv.fp32_precision == "tf32") == wanted
        # What torch's own compiler still reads.
        assert (torch.get_float32_matmul_precision() == "high") == wanted
        assert ("TF32" if wanted else "exactly") in (said or "")
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_what_equal_to_the_last_bit_means_is_said():
    with arithmetic(TrainingSettings(precision="bf16"), GPU) as said:
        assert said is not None
        assert said.startswith("a run that is resumed or repeated is equal to rounding")
    with arithmetic(TrainingSettings(precision="bf16", deterministic=True), GPU) as said:
        assert said is not None
        assert said.startswith("deterministic operators: equal to the last bit on GPUs of one")
    with arithmetic(TrainingSettings(), CPU) as said:
        assert said is None
    with arithmetic(TrainingSettings(tf32=True), CPU) as said:
        assert said == "training.tf32 changes nothing on a CPU"


def test_deterministic_operators_are_on_while_a_run_trains(
    config: Config, monkeypatch: pytest.MonkeyPatch, at
):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    found: list[bool] = []
    watch = at({0, 1}, lambda _: found.append(torch.are_deterministic_algorithms_enabled()))
    training = replace(config.training, deterministic=True, steps=2)
    runs.run(replace(config, training=training), callbacks=[watch])
    assert found == [True, True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_cublas_and_inductor_are_told_too():
    """In a process of its own: the former is told by a variable, which stays."""
    program = """
import os, torch, torch._inductor.config as inductor
from kanlm.config import TrainingSettings
from kanlm.training.arithmetic import arithmetic
with arithmetic(TrainingSettings(deterministic=True), torch.device("cpu")):
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert inductor.deterministic and not torch.backends.cudnn.benchmark
    x = torch.randn(4, 4).cumsum(0)
assert not inductor.deterministic
"""
    subprocess.run([sys.executable, "-c", program], check=True)
