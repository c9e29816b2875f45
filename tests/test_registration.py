"""`import kanlm` is enough for transformers' Auto classes, in either order, and stays light."""

import subprocess
import sys
from pathlib import Path

import pytest

LOAD = "print(type(AutoModelForCausalLM.from_pretrained({folder!r})).__name__)"


@pytest.mark.parametrize(
    "imports",
    [
        ["import kanlm", "from transformers import AutoModelForCausalLM"],
        ["from transformers import AutoModelForCausalLM", "import kanlm"],
        ["import kanlm.model", "from transformers import AutoModelForCausalLM"],
    ],
)
def test_auto_classes_know_the_model(imports: list[str], finished_runs: Path) -> None:
    code = "\n".join([*imports, LOAD.format(folder=str(finished_runs / "kan" / "model"))])
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["KanLMForCausalLM"]


def test_the_config_alone(finished_runs: Path) -> None:
    code = (
        "import kanlm, sys\n"
        "from transformers import AutoConfig\n"
        f"print(AutoConfig.from_pretrained({str(finished_runs / 'kan' / 'model')!r}).model_type)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["kanlm"]


def test_importing_is_light() -> None:
    code = "import sys, kanlm; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
