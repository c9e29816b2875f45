"""Rows written by any number of processes are read by any other, and damage is named."""

import json
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from kanlm.config import OptimizerSettings
from kanlm.errors import UserError
from kanlm.training.checkpointing.tensors import (
    INDEX,
    Layout,
    StoredTensors,
    load_moments,
    write_index,
)
from kanlm.training.optimizer import build_optimizer


def cuts(draw: st.DrawFn, rows: int) -> list[int]:
    """Where the rows are cut, with 0 and their number."""
    inner = draw(st.lists(st.integers(0, rows), max_size=4))
    return sorted([0, *inner, rows])


def write(folder: Path, whole: torch.Tensor, edges: list[int]) -> None:
    """Write a tensor `w`, a part to each process, as they would."""
    layouts = []
    for rank, (start, stop) in enumerate(pairwise(edges)):
        if start < stop:
            save_file({"w": whole[start:stop].clone()}, folder / f"model-rank-{rank}.safetensors")
            layouts.append({"model": {"w": Layout(list(whole.shape), [(rank, start, stop)])}})
    write_index(folder, layouts)


@given(st.data())
def test_any_rows_are_read_from_any_cut(data: st.DataObject):
    rows, columns = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3))
    whole = torch.arange(float(rows * columns)).reshape(rows, columns)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
    with TemporaryDirectory() as folder:
        write(Path(folder), whole, data.draw(st.composite(cuts)(rows)))
        stored = StoredTensors(Path(folder), "model")
        assert stored.shapes == {"w": (rows, columns)}
        read = stored.rows("w", start, stop)
    assert read.shape == (stop - start, columns)
    assert read.dtype == whole.dtype
    assert torch.equal(read, whole[start:stop])


def test_whole_files_are_read_by_rows_too(tmp_path: Path):
    whole = torch.randn(5, 2)
    save_file({"w": whole, "n": torch.tensor(7.0)}, tmp_path / "optimizer.safetensors")
    stored = StoredTensors(tmp_path, "optimizer")
    assert torch.equal(stored.rows("w", 1, 4), whole[1:4])
    assert stored.rows("n", 0, 1) == torch.tensor(7.0)


def change(tree: Any, path: list[Any], value: Any) -> None:
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["model", "w", "parts", 0, 1], 1, r"w is \(2, 3\) in model-rank-0.*not \(1, 3\)"),
        (["model", "w", "parts", 0, 2], 3, r"w is \(2, 3\) in model-rank-0.*not \(3, 3\)"),
        (["model", "w", "parts", 1], [1, 3, 5], r"row 2 of w is in none of the files"),
        (["model", "w", "shape"], [4, 7], r"w is \(2, 3\) in model-rank-0.*not \(2, 7\)"),
        (["model", "w", "shape"], [9**99, 3], "row 4 of w is in none of the files"),
        (["model", "w", "parts"], [], "row 0 of w is in none of the files"),
        (["model", "w", "parts", 1, 0], 5, "model-rank-5.safetensors cannot be read"),
        (["model", "w", "parts", 1, 0], "../x", "integer"),
        (["model", "w"], 3, "model.w"),
        (["other"], {}, "other"),
    ],
)
def test_an_index_that_is_wrong_is_named(tmp_path: Path, path: list[Any], value: Any, said: str):
    whole = torch.arange(12.0).reshape(4, 3)
    write(tmp_path, whole, [0, 2, 4])
    tree = json.loads((tmp_path / INDEX).read_text())
    change(tree, path, value)
    (tmp_path / INDEX).write_text(json.dumps(tree))

    def read() -> torch.Tensor:
        stored = StoredTensors(tmp_path, "model")
        return stored.rows("w", 0, max(4, stored.shapes["w"][0]))

    with pytest.raises(UserError, match=said) as raised:
        read()
    assert "\n" not in str(raised.value)


def test_an_index_that_is_not_json_is_refused(tmp_path: Path):
    for text in ("", "[" * 100_000, "[]", "null", '{"model": NaN}'):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(UserError, match=INDEX):
            StoredTensors(tmp_path, "model")


def test_no_rows_of_what_is_nowhere_are_refused_too(tmp_path: Path):
    """As a process asks for that has no part of a tensor."""
    write(tmp_path, torch.arange(12.0).reshape(4, 3), [0, 2, 4])
    tree = json.loads((tmp_path / INDEX).read_text())
    tree["model"]["w"]["parts"] = []
    (tmp_path / INDEX).write_text(json.dumps(tree))
    with pytest.raises(UserError, match="in none of the files"):
        StoredTensors(tmp_path, "model").rows("w", 4, 4)


def test_what_should_have_no_dimensions_has_none(tmp_path: Path):
    write(tmp_path, torch.arange(4.0), [0, 4])
    tree = json.loads((tmp_path / INDEX).read_text())
    tree["model"]["w"]["shape"] = []
    (tmp_path / INDEX).write_text(json.dumps(tree))
    with pytest.raises(UserError, match="w is"):
        StoredTensors(tmp_path, "model").rows("w", 0, 1)


def test_all_moments_go_where_their_parameter_is(tmp_path: Path):
    """Step counts as well: fused AdamW on a GPU makes them there, and reads them there."""
    moments = {"w:step": torch.tensor(3.0), "w:exp_avg": torch.ones(2)}
    save_file({**moments, "w:exp_avg_sq": torch.ones(2)}, tmp_path / "optimizer.safetensors")
    model = torch.nn.Module()
    # As good as a GPU: a device that is not the one on which files are read.
    model.w = torch.nn.Parameter(torch.empty(2, device="meta"))
    optimizer = build_optimizer(model, OptimizerSettings())
    load_moments(model, optimizer, tmp_path)
    assert {key: str(value.device) for key, value in optimizer.state[model.w].items()} == {
        "step": "meta",
        "exp_avg": "meta",
        "exp_avg_sq": "meta",
    }


@pytest.mark.parametrize("how", ["overlap", "dtype"])
def test_files_that_contradict_each_other_are_refused(tmp_path: Path, how: str):
    """Two that hold the same row, or numbers of other precision than the others'."""
    whole = torch.arange(12.0).reshape(4, 3)
    write(tmp_path, whole, [0, 2, 4])
    if how == "overlap":
        save_file({"w": whole[1:].clone() + 100}, tmp_path / "model-rank-1.safetensors")
        tree = json.loads((tmp_path / INDEX).read_text())
        tree["model"]["w"]["parts"][1] = [1, 1, 4]
        (tmp_path / INDEX).write_text(json.dumps(tree))
    else:
        save_file({"w": whole[2:].to(torch.int8)}, tmp_path / "model-rank-1.safetensors")
    with pytest.raises(UserError, match="w is"):
        StoredTensors(tmp_path, "model").rows("w", 0, 4)


def test_an_index_is_quoted_in_one_line(tmp_path: Path):
    (tmp_path / INDEX).write_text(json.dumps({"model": {"a\nb": 3}}))
    with pytest.raises(UserError, match=INDEX) as raised:
        StoredTensors(tmp_path, "model")
    assert "\n" not in str(raised.value)
