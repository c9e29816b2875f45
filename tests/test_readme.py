"""Every command of the README, run in its order under `shrink=true`.

Each is looked at for what it wrote. The cheap ones run in one process; those that start
processes of their own are slow.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from kanlm.cli import main
from kanlm.config import load
from kanlm.kan import BASES
from kanlm.model.feed_forward import FEED_FORWARDS
from kanlm.training.resolve import resolve
from kanlm.training.run_folder import READ_BY

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if "kanlm " in line
]
(YAML,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
PYTHON, LAYERS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

#: What a command must have written, by how it begins: run or study folder.
WRITES = {
    "kanlm pretrain configs/pretrain.yaml": "runs/pretrain",
    "kanlm finetune": "runs/finetune",
    "kanlm finetune configs/finetune.yaml strategy=replay": "runs/replay",
    "kanlm finetune configs/finetune.yaml strategy.kind=ewc": "runs/ewc",
    "kanlm compare configs/shakespeare.yaml output_dir=runs/sweep": "runs/sweep",
    "kanlm compare configs/shakespeare.yaml output_dir=runs/gpus": "runs/gpus",
    "kanlm compare configs/shakespeare.yaml": "runs/shakespeare",
    "kanlm continual": "runs/quickstart",
    "accelerate launch": "runs/accelerate",
    "torchrun": "runs/torchrun",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the README's reader has it: the configs, and Shakespeare in data/."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "data").mkdir()
    verses = (
        f"Speak, friend {n}, and enter; thou art {n * n} times welcome.\n" for n in range(2000)
    )
    (folder / "data" / "shakespeare.txt").write_text("".join(verses))
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return place


def check_written(command: str, folder: Path) -> None:
    """A run or study folder holds steps of training, results and a page."""
    prefix = max((p for p in WRITES if command.startswith(p)), key=len)
    place = folder / WRITES[prefix]
    results = json.loads((place / "results.json").read_text())
    for arm in results["arms"].values():
        assert arm["train_tokens"] > 0
        assert arm["bits_per_byte"][0][0] > 0
    assert "<svg" in (place / "report.html").read_text()
    for metrics in place.rglob("metrics.jsonl"):
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        assert max(line["step"] for line in lines) == 2


def started_here(command: str) -> bool:
    words = command.split()
    return words[0] == "kanlm" and (
        words[1] not in ("compare", "continual") or "--dry-run" in words
    )


def test_the_readme_shows_every_verb():
    shown = {command.split("kanlm ")[1].split()[0] for command in COMMANDS}
    assert shown == {
        "pretrain", "finetune", "evaluate", "compare", "continual", "generate", "data", "plan",
        "runs",
    }  # fmt: skip


def test_commands_that_run_in_this_process(here: Path, capsys: pytest.CaptureFixture[str]):
    for command in filter(started_here, COMMANDS):
        capsys.readouterr()
        words = shlex.split(command)[1:]
        # Verbs that take finished runs, which were shrunk, read neither; a plan is of the whole.
        shrunk = (
            []
            if words[0] in (*READ_BY, "plan", "runs")
            else ["shrink=true", "tracking.wandb=disabled"]
        )
        main([*words, *shrunk])
        printed = capsys.readouterr().out
        if words[0] in ("pretrain", "finetune"):
            check_written(command, here)
        elif words[0] == "evaluate":
            assert "runs/pretrain" in printed
            assert "runs/finetune" in printed
        elif words[0] == "runs":
            assert "finetune" in printed
        elif words[0] == "generate":
            assert "The return value" in printed
        elif words[0] == "data":
            assert "stdlib-prose" in printed
        elif words[0] == "plan":
            assert "parameters" in printed
        else:
            assert {"kan", "swiglu", "gelu"} <= set(printed.split())


def test_the_settings_resolve(tmp_path: Path):
    (tmp_path / "shown.yaml").write_text(YAML)
    config = resolve(load(tmp_path / "shown.yaml", ["training.steps=2000"]))
    layers = config.model.feed_forward_by_layer
    assert [layer["kind"] for layer in layers] == ["swiglu"] * 8 + ["kan-local"] * 4
    assert layers[-1]["basis"]["grid_size"] == 8


def test_the_table_names_every_kind_and_basis():
    assert not [kind for kind in (*FEED_FORWARDS, *BASES) if f"`{kind}`" not in README]


def test_the_python_lines(here: Path):
    shrunk = PYTHON.replace(
        '["output_dir', '["shrink=true", "tracking.wandb=disabled", "output_dir'
    )
    assert shrunk != PYTHON
    namespace: dict = {}
    exec(shrunk, namespace)
    assert isinstance(
        namespace["model"], type(AutoModelForCausalLM.from_pretrained("runs/python/model"))
    )
    assert namespace["model"].config.model_type == "kanlm"
    assert namespace["tokenizer"].decode(namespace["tokenizer"].encode("a b")) == "a b"


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if not started_here(c)])
def test_a_command_that_starts_processes(here: Path, command: str):
    # The launchers beside this Python, whatever is first on the path.
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    words = [
        word.replace("--num_processes 8", "--cpu --num_processes 1")
        for word in shlex.split(command)
    ]
    if words[0] == "accelerate":
        words.insert(2, "--cpu")
    done = subprocess.run(
        [*words, "shrink=true", "tracking.wandb=disabled"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    check_written(command, here)


def test_the_lines_about_layers():
    namespace: dict = {}
    exec(LAYERS, namespace)
    assert namespace["y"].shape == (32, 10)
