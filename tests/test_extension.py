"""What the README promises of additions: one class and one line each."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kanlm.config import from_tree, merge
from kanlm.data.sources import SOURCES
from kanlm.data.sources.base import Cursor, Source
from kanlm.errors import UserError
from kanlm.kan.bases import BASES, Basis, Refinable
from kanlm.model.accounting import account
from kanlm.model.feed_forward import FEED_FORWARDS, FeedForward
from kanlm.training import run as runs
from kanlm.training.resolve import resolve


class Monomials(Basis):
    """x, x², …, x^degree."""

    def __init__(self, channels: int | None = None, *, degree: int = 3) -> None:
        super().__init__()
        self.degree = self.num_functions = degree
        self.flops_per_input = degree - 1

    @property
    def label(self) -> str:
        return f"monomials{self.degree}"

    def values(self, x: Tensor) -> Tensor:
        return torch.stack([x**power for power in range(1, self.degree + 1)], dim=-1)

    starting_values = values

    def reset_parameters(self) -> None:
        pass


class Steps(Refinable):
    """Constants on `grid_size` cells of (−3, 3); the outer ones reach to infinity."""

    support = 1

    def __init__(self, channels: int | None = None, *, grid_size: int = 2) -> None:
        super().__init__()
        self.grid_size = self.num_functions = grid_size
        self.flops_per_input = 3

    @property
    def label(self) -> str:
        return f"steps{self.grid_size}"

    def active(self, x: Tensor) -> tuple[Tensor, Tensor]:
        cell = ((x + 3) * self.grid_size / 6).long().clamp(0, self.grid_size - 1)
        return cell, torch.ones_like(x).unsqueeze(-1)

    def starting_values(self, x: Tensor) -> Tensor:
        return self.values(x.unsqueeze(-1)).squeeze(-2)

    def reset_parameters(self) -> None:
        pass

    def refined(self, grid_size: int) -> tuple["Steps", Tensor]:
        parts = grid_size // self.grid_size
        matrix = torch.eye(self.grid_size, dtype=torch.float64).repeat_interleave(parts, dim=0)
        return Steps(grid_size=grid_size), matrix.unsqueeze(0)


class Bilinear(FeedForward):
    """One linear map times another, then a third."""

    def __init__(self, d_model: int, hidden: int, output_scale: float, *, bias: bool = False):
        super().__init__(d_model, hidden, output_scale)
        self.label = "bilinear"
        self.one, self.other = nn.Linear(d_model, hidden, bias), nn.Linear(d_model, hidden, bias)
        self.down = nn.Linear(hidden, d_model, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.one(x) * self.other(x))

    @property
    def flops_per_token(self) -> int:
        return 2 * sum(p.numel() for p in self.parameters())


class Counting(Source):
    """The numbers up to `limit`, ten a document."""

    label = "counting"

    def __init__(self, root: str | Path = ".", *, limit: int = 5000) -> None:
        super().__init__(root)
        self.limit = limit

    def read(self, cursor: Cursor | None = None) -> Iterator[tuple[str, Cursor]]:
        for start in range(cursor["next"] if cursor else 0, self.limit, 10):
            yield " ".join(map(str, range(start, start + 10))), {"next": start + 10}

    def fingerprint(self) -> str:
        return f"counting to {self.limit}"

    def describe(self) -> str:
        return self.fingerprint()


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BASES, "monomials", Monomials)
    monkeypatch.setitem(BASES, "steps", Steps)
    monkeypatch.setitem(FEED_FORWARDS, "bilinear", Bilinear)
    monkeypatch.setitem(SOURCES, "counting", Counting)


def settings(tmp_path: Path, **feed_forward) -> dict:
    return {
        "output_dir": str(tmp_path / "run"),
        "shrink": True,
        "data": {
            "domain": "numbers",
            "cache_dir": str(tmp_path / "cache"),
            "sources": [{"kind": "counting", "limit": 4000}],
        },
        "tokenizer": "bytes",
        "model": {"feed_forward": feed_forward},
        "tracking": {"wandb": "disabled"},
    }


@pytest.mark.parametrize(
    ("feed_forward", "label"),
    [
        ({"kind": "kan", "basis": {"kind": "monomials", "degree": 2}}, "kan/monomials2-silu"),
        ({"kind": "bilinear", "bias": True}, "bilinear"),
    ],
)
def test_a_new_kind_trains_from_a_config(tmp_path: Path, feed_forward: dict, label: str):
    config = resolve(from_tree(settings(tmp_path, **feed_forward)))
    outcome = runs.run(config)
    assert outcome is not None
    assert outcome.accounting.feed_forward == label
    # The width was solved for 8 d_model² parameters a layer.
    spec = config.model.feed_forward_by_layer[0]
    found = account(config.model, 257).parameters["feed_forward"] / config.model.n_layers
    narrower = FEED_FORWARDS[spec["kind"]](
        16, 1, 1.0, **{k: v for k, v in spec.items() if k not in ("kind", "hidden")}
    )
    unit = sum(p.numel() for p in narrower.parameters())
    assert abs(found - 8 * 16**2) <= max(unit, 0.01 * 8 * 16**2)


def test_a_new_basis_that_declares_refinement_is_refined(tmp_path: Path):
    tree = settings(tmp_path, kind="kan", basis={"kind": "steps", "grid_size": 2})
    part = {"training": {"grid_schedule": {0: 2, 1: 6}}, "schedule": {"warmup_steps": 0}}
    outcome = runs.run(resolve(from_tree(merge(tree, part))))
    assert outcome is not None
    assert outcome.accounting.feed_forward.startswith("kan/steps6")
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    layers = config["feed_forward"]
    layers = layers if isinstance(layers, list) else [layers]
    assert [layer["basis"]["grid_size"] for layer in layers] == [6] * len(layers)
    # Nothing says how to move its cells, nor how its functions bend.
    for part, said in [
        ({"training": {"grid_adaptation_steps": [1]}}, "training.grid_adaptation_steps"),
        ({"penalties": {"curvature": 1e-3}}, "curvature of steps2"),
    ]:
        with pytest.raises(UserError, match=said):
            resolve(from_tree(merge(tree, part)))


def test_options_of_a_new_kind_are_checked_by_its_annotations(tmp_path: Path):
    tree = settings(tmp_path, kind="kan", basis={"kind": "monomials", "degree": "two"})
    with pytest.raises(
        UserError, match=r"basis\.degree = \"two\": input should be a valid integer"
    ):
        resolve(from_tree(tree))
