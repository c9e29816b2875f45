"""What the architecture page says of the code: its links, its rooms and their arrows."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import kanlm
from kanlm.config import from_tree
from kanlm.training.callbacks import Callback

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kanlm"
PAGE = PACKAGE / "README.md"
#: Room → rooms that it may import, as the page's table has it.
ROWS = re.findall(r"^\| \[([\w.]+)/?\]\([\w./]+\) \|.*\|([^|]*)\|$", PAGE.read_text(), re.M)
ARROWS = {room.removesuffix(".py"): re.findall(r"`(\w+)`", cell) for room, cell in ROWS}
#: Modules without a room of their own, which every room may import.
(BASICS,) = re.findall(r"^Every room may import (.*?)\.\n", PAGE.read_text(), re.M | re.S)
BASIC = [name.removesuffix(".py") for name in re.findall(r"\[(\w+\.py)\]", BASICS)]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


ROOMS = {room_of(path) for path in PACKAGE.rglob("*.py")}


def imported(path: Path) -> Iterator[str]:
    """Rooms of kanlm that a module imports, anywhere in it."""
    here = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(here[: len(here) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (above, node.module)))
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, *rest = name.split(".")
            if package == "kanlm" and rest[0] in ROOMS:
                yield rest[0]


def test_every_room_stands_in_the_table() -> None:
    assert ROOMS - {"__init__", "__main__"} == {*ARROWS, *BASIC}
    assert {name for cell in ARROWS.values() for name in cell} <= {*ARROWS}


@pytest.mark.parametrize("room", sorted({*ARROWS, *BASIC}))
def test_imports_go_along_the_arrows_alone(room: str) -> None:
    allowed = {room, *BASIC, *ARROWS.get(room, ())}
    paths = [path for path in PACKAGE.rglob("*.py") if room_of(path) == room]
    wrong = {
        f"{path.relative_to(ROOT)} imports kanlm.{name}"
        for path in paths
        for name in imported(path)
        if name not in allowed
    }
    assert not wrong


def test_arrows_lead_one_way() -> None:
    order: list[str] = []
    while len(order) < len(ARROWS):
        free = [room for room in ARROWS if room not in order and {*ARROWS[room]} <= {*order}]
        assert free, f"a circle among {sorted({*ARROWS} - {*order})}"
        order += free


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "kanlm/README.md", "configs/README.md"]
)
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#\s]+)", (ROOT / page).read_text())
    assert [target for target in targets if not ((ROOT / page).parent / target).exists()] == []


def test_names_in_the_page_exist() -> None:
    """`name()` or `Name` after a link to a Python file is defined in that file."""
    found = re.findall(
        r"\[[\w./]+\]\(([\w./]+\.py)\)'s ((?:`\w+(?:\(\))?`(?:, | and )?)+)", PAGE.read_text()
    )
    assert found
    for target, names in found:
        tree = ast.parse((PACKAGE / target).read_text())
        defined = {
            node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)
        }
        assert {*re.findall(r"\w+", names.replace(" and ", " "))} <= defined, target


def test_the_callback_in_the_page_averages_weights(tmp_path: Path, make_tree) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names: dict[str, Any] = {}
    exec(block.partition("config = ")[0], names)
    seen: dict[str, list[torch.Tensor]] = {}

    class Recorder(Callback):
        def after_step(self) -> None:
            for name, parameter in self.trainer.model.named_parameters():
                seen.setdefault(name, []).append(parameter.detach().clone())

    config = from_tree(make_tree(tmp_path, training={"steps": 4, "precision": "fp64"}))
    folder = kanlm.train(config, callbacks=[Recorder(), names["WeightAverage"]()])
    assert folder is not None
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, torch.stack(seen[name]).mean(0), rtol=0, atol=1e-12)
