import shutil

import pytest
import torch
from accelerate import Accelerator

from kanlm.errors import UserError
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.settings import ModelSettings
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
