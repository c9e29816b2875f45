"""Files of settings, trees of them drawn at random, and the line in which one is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kanlm.config import from_tree
from kanlm.errors import UserError
from kanlm.training.resolve import resolve


@pytest.fixture
def refusal() -> Callable[[dict[str, Any]], str]:
    def refusal(tree: dict[str, Any]) -> str:
        """The line in which a tree is refused, by the dataclasses or by the registries."""
        with pytest.raises(UserError) as caught:
            resolve(from_tree(tree))
        line = str(caught.value)
        assert "\n" not in line
        return line

    return refusal


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write
