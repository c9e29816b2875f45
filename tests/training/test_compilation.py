import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from kanlm.errors import UserError
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.settings import ModelSettings
from kanlm.training import compilation
from kanlm.training.compilation import compile_model

on_a_cpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="about machines without GPU")


def tiny(feed_forward: str = "kan") -> KanLMForCausalLM:
    torch.manual_seed(0)
    settings = ModelSettings(
        d_model=16,
        n_layers=1,
        n_heads=2,
        context_length=8,
        feed_forward={"kind": feed_forward, "hidden": 16},
    )
    return KanLMForCausalLM(KanLMConfig.from_settings(settings, 17))


@on_a_cpu
def test_on_without_a_compiler_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"training\.compile = on: .* C\+\+ compiler"):
        compile_model(tiny(), "on", Accelerator(cpu=True))


@on_a_cpu
def test_auto_says_what_it_chose():
    assert compile_model(tiny(), "auto", Accelerator(cpu=True)).startswith("eager (")
    assert compile_model(tiny(), "off", Accelerator(cpu=True)) == "eager, as asked"


def test_a_gpu_without_a_c_compiler_runs_eagerly(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(compilation, "has_triton", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    said = compile_model(tiny(), "auto", gpu)  # pyright: ignore[reportArgumentType]
    assert said.startswith("eager (compiling for a GPU needs a C compiler")
    with pytest.raises(UserError, match=r"training\.compile = on: .* needs a C compiler"):
        compile_model(tiny(), "on", gpu)  # pyright: ignore[reportArgumentType]
    (tmp_path / "gcc").write_text("#!/bin/sh\n")
    (tmp_path / "gcc").chmod(0o755)
    assert compile_model(tiny(), "auto", gpu) == "compiled"  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
@on_a_cpu
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no compiler")
@pytest.mark.parametrize("feed_forward", ["kan", "kat"])
def test_compiled_gives_the_eager_loss_and_gradients(feed_forward: str):
    ids = torch.randint(17, (2, 8), generator=torch.Generator().manual_seed(0))
    models = [tiny(feed_forward).double() for _ in range(2)]
    assert compile_model(models[1], "on", Accelerator(cpu=True)) == "compiled"
    found = []
    for model in models:
        loss = model(input_ids=ids, labels=ids).loss
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


RUN = """
import sys, yaml
from torch._dynamo.utils import counters
from kanlm.config import from_tree
from kanlm.training.resolve import resolve
from kanlm.training.run import run
run(resolve(from_tree(yaml.safe_load(sys.argv[1]))))
print("found", counters["inductor"]["fxgraph_cache_hit"])
print("made", counters["inductor"]["fxgraph_cache_miss"])
"""


@pytest.mark.slow
@on_a_cpu
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no compiler")
def test_a_second_run_finds_what_the_first_compiled(tmp_path: Path, make_tree):
    counts, seconds = [], []
    for name in ("first", "second"):
        tree = make_tree(tmp_path, output_dir=str(tmp_path / name), training={"compile": "on"})
        done = subprocess.run(
            [sys.executable, "-c", RUN, json.dumps(tree)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        )
        words = done.stdout.split()
        counts.append([int(words[words.index(word) + 1]) for word in ("found", "made")])
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        train = [line for line in map(json.loads, lines) if line["kind"] == "train"]
        assert 0 < train[-1]["compile_seconds"] < train[-1]["seconds"]
        seconds.append(train[-1]["compile_seconds"])
    (found, made), again = counts
    assert found == 0
    assert made > 0
    assert again == [made, 0]
    assert seconds[1] < seconds[0]
