import shutil

import pytest
import torch
from accelerate import Accelerator

from kanlm.errors import UserError
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.settings import ModelSettings
from kanlm.training.compilation import compile_model

on_a_cpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="about machines without GPU")


def tiny() -> KanLMForCausalLM:
    torch.manual_seed(0)
    settings = ModelSettings(d_model=16, n_layers=1, n_heads=2, context_length=8)
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
def test_compiled_gives_the_eager_loss():
    ids = torch.randint(17, (2, 8), generator=torch.Generator().manual_seed(0))
    eager = tiny()(input_ids=ids, labels=ids).loss
    model = tiny()
    assert compile_model(model, "on", Accelerator(cpu=True)) == "compiled"
    compiled = model(input_ids=ids, labels=ids).loss
    assert compiled.item() == pytest.approx(eager.item(), abs=1e-4)
