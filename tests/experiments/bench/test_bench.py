"""Benchmarks end to end at tiny sizes: counts are checked, times only exist."""

import json
from pathlib import Path

import pytest
import torch

from kanlm.errors import UserError
from kanlm.experiments.bench.decode import bytes_read
from kanlm.experiments.bench.layers import matched_block
from kanlm.experiments.bench.run import bench
from kanlm.experiments.bench.saved import saved_bytes
from kanlm.model.feed_forward import make_feed_forward


def run(name: str, folder: Path, *overrides: str) -> dict:
    silent = bench(name, [*overrides, f"output_dir={folder}"], report=lambda text: None)
    return json.loads((silent / "results.json").read_text())


def test_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = run("layers", tmp_path, "widths=[32]", "tokens=64", "rounds=2", "blocks=[kan]")
    by_key = {(row["block"], row["mode"]): row for row in results["rows"]}
    assert set(by_key) == {
        (b, m) for b in ("gelu", "kan/hermite3-squash") for m in ("eager", "compiled")
    }
    assert by_key["gelu", "compiled"]["time_ratio"]["median"] == 1
    assert all(row["seconds"] > 0 for row in results["rows"])
    mlp, kan = by_key["gelu", "eager"], by_key["kan/hermite3-squash", "eager"]
    # Before and after the activation.
    assert mlp["saved_bytes"] == 2 * 64 * 4 * 32 * 4
    assert kan["saved_bytes"] <= mlp["saved_bytes"]
    assert kan["parameters"] == pytest.approx(mlp["parameters"], rel=0.02)
    assert kan["flops"] == pytest.approx(mlp["flops"], rel=0.5)
    assert {path.name for path in tmp_path.glob("*.svg")} == {
        "time-by-width.svg",
        "memory-by-width.svg",
    }
    assert results["provenance"]["versions"]["torch"] == torch.__version__
    assert "kan/hermite3-squash" in capsys.readouterr().out


def test_decode(tmp_path: Path) -> None:
    blocks = "blocks=[{kind: kan-local, base: null, basis: {kind: bspline, grid_size: 7}}]"
    sizes = ["d_model=32", "n_layers=2", "batch_sizes=[1,3]", "dtypes=[bfloat16]", "rounds=2"]
    results = run("decode", tmp_path, *sizes, blocks)
    rows = [row for row in results["rows"] if row["block"] == "kan/bspline1-g7"]
    assert [row["batch_size"] for row in rows] == [1, 3]
    # Two of eight functions, and a norm's gains, which all blocks read.
    assert rows[0]["bytes_ratio"] == pytest.approx(2 / 8, abs=0.01)
    assert rows[1]["bytes_ratio"] == pytest.approx(1 - (6 / 8) ** 3, abs=0.01)
    assert (tmp_path / "decode-bfloat16.svg").exists()


def test_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kanlm.experiments.bench.data._TOKENS", 2**10)
    text = "".join(f"the cat number {number} sat on the mat\n" for number in range(400))
    (tmp_path / "text.txt").write_text(text)
    settings = ["megabytes=0.1", "tokenizers=[bpe]", "vocab_size=300", "rounds=2"]
    sizes = ["context_lengths=[16,32]", "batch_tokens=64", f"source={tmp_path / 'text.txt'}"]
    results = run("data", tmp_path / "out", *settings, *sizes)
    preparing, *batches = results["rows"]
    assert preparing["tokenizer"] == "bpe"
    assert preparing["megabytes"] == len(text) / 1e6
    assert len(text) / 10 < preparing["tokens"] < len(text) / 2
    for unit in ("tokens", "megabytes"):
        speed = preparing[unit] / preparing["seconds"]
        assert preparing[f"{unit}_per_second"] == pytest.approx(speed)
    assert preparing["peak_memory_bytes"] >= 0
    assert [(row["batch_size"], row["context_length"]) for row in batches] == [(4, 16), (2, 32)]
    assert all(row["tokens"] == 2**10 for row in batches)
    assert all(row["speed_ratio"]["median"] > 0 for row in results["rows"])
    assert "batches of 4 × 16" in capsys.readouterr().out


def test_a_source_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'stdlib-code'"):
        run("data", tmp_path, "source=stdlib-cod")
    assert not any(tmp_path.iterdir())


def test_bytes_of_a_block_are_its_weights() -> None:
    assert bytes_read(make_feed_forward({"kind": "gelu", "hidden": 8}, 4, 1.0)) == 2 * 4 * 8 * 4
    assert bytes_read(matched_block("kan", 32)) == 4 * sum(
        p.numel() for p in matched_block("kan", 32).parameters()
    )


def test_a_storage_counts_once_and_the_modules_own_do_not() -> None:
    linear, x = torch.nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True)
    assert saved_bytes(linear, x, linear) == 0

    # The sigmoid keeps its result, the product both factors, of which one is that result.
    def gated(x: torch.Tensor) -> torch.Tensor:
        y = linear(x)
        return torch.sigmoid(y) * y

    assert saved_bytes(gated, x, linear) == 2 * 3 * 4 * 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("width=3", "unknown setting 'width'; did you mean 'widths'"),
        ("blocks=[kann]", "blocks: .*'kann' is unknown; did you mean 'kan'"),
        ("tokens=many", "tokens = "),
        ("backend=tritn", "backend = .tritn."),
        ("backend=sparse", "backend = 'sparse' takes local bases"),
        ("tokens", "expected section.key=value"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run("layers", tmp_path, override)
    assert not any(tmp_path.iterdir())
