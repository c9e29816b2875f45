"""Benchmarks end to end at tiny sizes: counts are checked, times only exist."""

import json
import sys
from pathlib import Path

import pytest
import torch
from benchmarking import BENCHMARKS, peers, step
from benchmarking.__main__ import bench, main
from benchmarking.blocks import matched_block
from benchmarking.decode_model import model_bytes_read
from benchmarking.growth import fitted_exponent
from benchmarking.measure import bytes_read, saved_bytes

from kanlm.errors import UserError
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.accounting import account
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


def test_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["d_model=32", "n_layers=2", "n_heads=2", "vocab_size=64", "context_length=16"]
    sizes += ["batch_size=2", "rounds=2", "modes=[eager]", "blocks=[kan]", "precision=bf16"]
    swiglu, kan, llama = run("step", tmp_path, *sizes)["rows"]
    assert (swiglu["block"], kan["block"]) == ("swiglu", "kan/hermite3-squash")
    assert llama["time_over_llama"]["median"] == 1
    assert llama["parameters"] == swiglu["parameters"]
    assert swiglu["speed_ratio"]["median"] == 1
    assert kan["tokens_per_second"] == pytest.approx(32 / kan["seconds"])
    assert kan["parameters"] == pytest.approx(swiglu["parameters"], rel=0.01)
    # Three products of every weight, and of attention's scores the half that is not masked.
    products = swiglu["parameters"] - 32 * 5
    scores = 2 * 2 * 2 * 32 * 16 / 2
    assert swiglu["flops"] == pytest.approx(32 * 3 * (2 * products + scores), rel=0.05)
    assert "swiglu" in capsys.readouterr().out


def test_a_step_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is a whole update: the loss on the same tokens falls."""
    losses = []

    def watched(model: torch.nn.Module, *args: object) -> None:
        losses.append(model(**batch).loss.item())

    settings = step.Settings(d_model=32, n_layers=1, n_heads=2, vocab_size=16, context_length=8)
    ids = torch.arange(16).view(2, 8)
    batch = {"input_ids": ids, "shift_labels": ids.roll(-1, dims=1)}
    torch.manual_seed(0)
    model = KanLMForCausalLM(step._config(settings, "kan"))
    take = step._make_step(settings, model, "eager", batch)
    for _ in range(20):
        watched(take.args[1])  # pyright: ignore[reportFunctionMemberAccess]
        take()
    assert losses[-1] < 0.8 * losses[0]


def test_growth(tmp_path: Path) -> None:
    sizes = ["tokens=[8,16,32]", "widths=[16,32,48]", "grids=[2,4,8]", "width=16"]
    results = run("growth", tmp_path, *sizes, "token_count=8", "rounds=2", "blocks=[kan]")
    by_key = {(row["axis"], row["block"]): row for row in results["rows"]}
    assert list(by_key) == [
        *((axis, b) for axis in ("tokens", "d_model") for b in ("gelu", "kan/hermite3-squash")),
        ("grid_size", "kan-local"),
    ]
    assert by_key["tokens", "gelu"]["flops_exponent"] == pytest.approx(1)
    assert by_key["d_model", "gelu"]["flops_exponent"] == pytest.approx(2, abs=0.1)
    assert 0.3 < by_key["grid_size", "kan-local"]["flops_exponent"] < 1
    assert len(list(tmp_path.glob("growth-*.svg"))) == 3


def test_an_exponent_is_the_slope_of_the_logarithms() -> None:
    slope, error = fitted_exponent([1, 2, 4, 8], [3 * size**1.7 for size in (1, 2, 4, 8)])
    assert slope == pytest.approx(1.7)
    assert error == pytest.approx(0, abs=1e-6)


def make_checkout(folder: Path) -> Path:
    """A repository in the shape of fast-kan, whose layer keeps 16 times its input."""
    (folder / "fastkan").mkdir(parents=True)
    (folder / "fastkan" / "__init__.py").write_text(
        """
import torch

class FastKANLayer(torch.nn.Linear):
    def __init__(self, inputs, outputs, num_grids, use_layernorm):
        super().__init__(16 * inputs, outputs)

    def forward(self, x):
        return super().forward(torch.cat([x.sin()] * 16, dim=-1))
"""
    )
    return folder


def test_peers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "PEERS", {"fast-kan": peers.PEERS["fast-kan"]})
    checkout = make_checkout(tmp_path / "repository")
    sizes = ["in_features=8", "out_features=8", "tokens=[32]", "rounds=2"]
    results = run("peers", tmp_path / "out", *sizes, f"peers.fast-kan={checkout}")
    ours, theirs = (row for row in results["rows"] if row["mode"] == "eager")
    assert (ours["layer"], theirs["layer"]) == ("kanlm", "fast-kan")
    assert ours["time_ratio"]["median"] == 1
    # Its base and eight Gaussians; theirs sixteen and a bias. Its product alone is 16 inputs wide.
    assert (ours["parameters"], theirs["parameters"]) == (9 * 64, 16 * 64 + 8)
    assert ours["saved_bytes"] == 0
    assert theirs["saved_bytes"] == 16 * 32 * 8 * 4
    assert "fast-kan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("peers.fastkan=.", "expected one of .*; did you mean 'fast-kan'"),
        ("peers.fast-kan=missing", "there is no such folder"),
        ("peers.fast-kan=.", "peers.fast-kan=.: No module named 'fastkan'"),
    ],
)
def test_a_peer_that_is_none_is_named(
    tmp_path: Path, override: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "PEERS", {"fast-kan": peers.PEERS["fast-kan"]})
    monkeypatch.delitem(sys.modules, "fastkan", raising=False)
    with pytest.raises(UserError, match=message):
        run("peers", tmp_path, override)


def test_decode(tmp_path: Path) -> None:
    blocks = "blocks=[{kind: kan-local, base: null, basis: {kind: bspline, grid_size: 7}}]"
    sizes = ["d_model=32", "n_layers=2", "batch_sizes=[1,3]", "dtypes=[bfloat16]", "rounds=2"]
    sizes += ["n_heads=2", "vocab_sizes=[64]", "generated=[swiglu,kan]", "generate_rounds=2"]
    sizes += ["generated_vocab_sizes=[64,128]", "other_generated=[kan-glu]"]
    results = run("decode", tmp_path, *sizes, blocks)
    layers = [row for row in results["rows"] if row["what"] == "layer"]
    assert [row["tokens"] for row in layers] == [1, 3]
    generated = [row for row in results["rows"] if row["what"] == "generate"]
    assert [(row["block"], row["vocab_size"]) for row in generated] == [
        *((block, 64) for block in ("swiglu", "kan/hermite3-squash", "kan-glu-gate/hermite2")),
        *((block, 128) for block in ("swiglu", "kan/hermite3-squash")),
    ]
    # Of the same shape, our SwiGLU reads what Llama does.
    assert generated[0]["bytes_ratio"] == pytest.approx(1, rel=0.01)
    *rows, model = [row for row in results["rows"] if row["block"] == "kan/bspline1-g7"]
    assert [row["batch_size"] for row in rows] == [1, 3]
    # Two of eight functions, and a norm's gains, which all blocks read.
    assert rows[0]["bytes_ratio"] == pytest.approx(2 / 8, abs=0.01)
    assert rows[1]["bytes_ratio"] == pytest.approx(1 - (6 / 8) ** 3, abs=0.01)
    # Of 2 × (4 + 8) d² weights and a head of 64 d, two layers' 8 d² are read by a quarter.
    expected = (2 * (4 + 8 / 4) * 32 + 64) / (2 * (4 + 8) * 32 + 64)
    assert model["bytes_ratio"] == pytest.approx(expected, rel=0.03)
    share = model["bytes_ratio"] / model["time_ratio"]["median"]
    assert model["share_of_allowed_speed"] == pytest.approx(share)
    assert (tmp_path / "decode-bfloat16.svg").exists()
    assert (tmp_path / "decode-models-bfloat16.svg").exists()


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_of_an_untied_embedding_one_row_is_read(tie_embeddings: bool) -> None:
    config = KanLMConfig(
        vocab_size=50, d_model=8, n_layers=1, n_heads=1, tie_embeddings=tie_embeddings
    )
    model = KanLMForCausalLM(config)
    assert model_bytes_read(model) == account(config).bytes_per_decoded_token()


def test_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarking.data._TOKENS", 2**10)
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
        ("blocks=[kann]", "blocks: .*'kann' is unknown; expected one of"),
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


def test_help_describes_every_benchmark_and_its_settings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert not stopped.value.code
    assert all(name in capsys.readouterr().out or name for name in BENCHMARKS)
    main(["growth", "--help"])
    assert "grids (list of whole number" in capsys.readouterr().out


def test_a_mistake_is_one_line() -> None:
    with pytest.raises(SystemExit, match="bench: unknown setting 'widht'; did you mean"):
        main(["layers", "widht=3"])
