"""Speed of `generate` beside transformers' own Llama, and of a layer beside `nn.Linear`.

1. Models have the shape of the Llama model, and feed-forward blocks of as many parameters. Each
   takes turns with it, greedily, at batch 1 and from a prompt of its own every time.
2. A layer has as many coefficients as the Linear beside it weights. Inputs are new every time, and
   several layers take turns, so that no weights are in a cache.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarking.blocks import llama, matched_spec
from benchmarking.decode_model import model_bytes_read
from benchmarking.measure import bytes_read, interleaved, ratio
from benchmarking.report import Results, markdown_table, rules, where
from kanlm.kan import KANLinear, decoding
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.accounting import account
from kanlm.reporting.format import duration, fixed, span
from kanlm.reporting.table import Table

if TYPE_CHECKING:
    from benchmarking.decode import Settings

_PROMPT, _NEW_TOKENS = 8, 12
#: Layers of one kind that take turns.
_LAYERS = 8


def measure_generate(settings: "Settings", report: Callable[[str], object]) -> list[dict]:
    """Return a row a dtype, vocabulary and block; `other_generated` with the first two alone."""
    rows = []
    for dtype, vocab_size in itertools.product(settings.dtypes, settings.generated_vocab_sizes):
        report(f"{dtype}, generate, {vocab_size:,} tokens")
        first = (dtype, vocab_size) == (settings.dtypes[0], settings.generated_vocab_sizes[0])
        blocks = (*settings.generated, *(settings.other_generated if first else ()))
        torch.manual_seed(0)
        peer = llama(_config(settings, "swiglu", vocab_size))
        rows += [_measure_model(settings, spec, dtype, vocab_size, peer) for spec in blocks]
    return rows


def _config(settings: "Settings", spec: Any, vocab_size: int) -> KanLMConfig:
    return KanLMConfig(
        vocab_size=vocab_size,
        d_model=settings.d_model,
        n_layers=settings.n_layers,
        n_heads=settings.n_heads,
        feed_forward=matched_spec(spec, settings.d_model),
        dropout=0.0,
    )


def _measure_model(
    settings: "Settings", spec: Any, dtype: str, vocab_size: int, peer: nn.Module
) -> dict:
    config = _config(settings, spec, vocab_size)
    model = KanLMForCausalLM(config)
    prompts = torch.randint(vocab_size, (256, 1, _PROMPT)).unbind()
    runs = {}
    for name, each in (("own", model), ("llama", peer)):
        nn.Module.to(each.eval(), getattr(torch, dtype))
        runs[name] = _generator(each, itertools.cycle(prompts))
    seconds = interleaved(runs, settings.generate_rounds, lambda: None)
    median = sorted(seconds["own"])[settings.generate_rounds // 2]
    return {
        "what": "generate",
        "dtype": dtype,
        "vocab_size": vocab_size,
        "block": account(config).feed_forward,
        "speed_ratio": ratio(seconds["llama"], seconds["own"]),
        "tokens_per_second": _NEW_TOKENS / median,
        # Its table is tied to its head.
        "bytes_ratio": model_bytes_read(model) / bytes_read(peer),
    }


def _generator(model: Any, prompts: Iterator[Tensor]) -> Callable[[], object]:
    def generate() -> None:
        model.generate(
            next(prompts),
            min_new_tokens=_NEW_TOKENS,
            max_new_tokens=_NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )

    return generate


@torch.inference_mode()
def measure_few_tokens(settings: "Settings", report: Callable[[str], object]) -> list[dict]:
    """Return one row a dtype and number of tokens: of the default layer, d_model → 4/3 d_model."""
    rows = []
    inputs, out = settings.d_model, settings.d_model * 4 // 3
    for name in settings.dtypes:
        report(f"{name}, a layer")
        dtype = getattr(torch, name)
        torch.manual_seed(0)
        layers = [KANLinear(inputs, out, bias=False).to(dtype) for _ in range(_LAYERS)]
        width = inputs * layers[0].basis.num_functions
        linears = [nn.Linear(width, out, bias=False).to(dtype) for _ in range(_LAYERS)]
        for tokens in settings.batch_sizes:
            runs = {
                "own": _turns(layers, torch.randn(64, tokens, inputs).to(dtype)),
                "linear": _turns(linears, torch.randn(64, tokens, width).to(dtype)),
            }
            with decoding(nn.ModuleList(layers)):
                seconds = interleaved(runs, settings.rounds, lambda: None)
            rows.append(
                {
                    "what": "layer",
                    "dtype": name,
                    "tokens": tokens,
                    "block": layers[0].label,
                    "time_ratio": ratio(seconds["own"], seconds["linear"]),
                    "seconds": sorted(seconds["own"])[settings.rounds // 2] / _LAYERS,
                }
            )
    return rows


def _turns(layers: list[Any], inputs: Tensor) -> Callable[[], object]:
    fresh = itertools.cycle(inputs.unbind())
    return lambda: [layer(next(fresh)) for layer in layers]


# Showing


def layer_table(results: Results) -> Table:
    """Tabulate a layer for a few tokens."""
    groups = [where(results, what="layer", dtype=d) for d in results["settings"]["dtypes"]]
    return Table(
        title="A layer for a few tokens, new inputs every time",
        columns=["layer", "dtype", "tokens", "× Linear's time", "quartiles", "time"],
        rows=[
            [
                row["block"],
                row["dtype"],
                str(row["tokens"]),
                fixed(row["time_ratio"]["median"], 2),
                span([row["time_ratio"]["low"], row["time_ratio"]["high"]], 2),
                duration(row["seconds"]),
            ]
            for group in groups
            for row in group
        ],
        note="The Linear has as many weights as the layer coefficients, and inputs as many times "
        "wider.",
        rules=rules(groups),
    )


def generate_table(results: Results) -> Table:
    """Tabulate `generate` beside Llama."""
    settings = results["settings"]
    groups = [
        where(results, what="generate", dtype=dtype, vocab_size=size)
        for dtype in settings["dtypes"]
        for size in settings["generated_vocab_sizes"]
    ]
    return Table(
        title=f"generate at batch 1: {settings['n_layers']} layers, d_model "
        f"{settings['d_model']}, equal parameters",
        columns=[
            "block",
            "dtype",
            "vocabulary",
            "× Llama's tokens/s",
            "quartiles",
            "× Llama's bytes",
            "tokens/s",
        ],
        rows=[
            [
                row["block"],
                row["dtype"],
                f"{row['vocab_size']:,}",
                fixed(row["speed_ratio"]["median"], 2),
                span([row["speed_ratio"]["low"], row["speed_ratio"]["high"]], 2),
                fixed(row["bytes_ratio"], 2),
                fixed(row["tokens_per_second"], 1),
            ]
            for group in groups
            for row in group
        ],
        note="Beside transformers' own Llama of the same shape, in the same process.",
        rules=rules(groups),
    )


def few_tokens_section(results: Results) -> str:
    """Write what a layer takes for a few tokens, in Markdown; empty if not measured."""
    settings = results["settings"]
    layers = [row for row in results["rows"] if row["what"] == "layer"]
    if not layers:
        return ""
    rows = [
        [layers[0]["block"], dtype]
        + [fixed(r["time_ratio"]["median"], 2) for r in layers if r["dtype"] == dtype]
        for dtype in settings["dtypes"]
    ]
    heads = ["layer", "dtype", *(f"{size} tokens" for size in settings["batch_sizes"])]
    return (
        "\n\n**A layer for a few tokens**: time over that of a Linear with as many weights, new "
        "inputs every time and weights out of cache.\n\n" + markdown_table(heads, rows)
    )


def generate_section(results: Results) -> str:
    """Write what `generate` reaches, in Markdown; empty if not measured."""
    settings = results["settings"]
    found = [row for row in results["rows"] if row["what"] == "generate"]
    if not found:
        return ""
    speeds = {(row["block"], row["dtype"], row["vocab_size"]): row for row in found}
    columns = [(d, v) for d in settings["dtypes"] for v in settings["generated_vocab_sizes"]]

    def cell(block: str, dtype: str, size: int) -> str:
        row = speeds.get((block, dtype, size))
        if row is None:
            return ""
        ratio = fixed(row["speed_ratio"]["median"], 2)
        return f"{ratio} ({fixed(row['bytes_ratio'], 2)})"

    blocks = dict.fromkeys(row["block"] for row in found)
    rows = [[block, *(cell(block, *column) for column in columns)] for block in blocks]
    heads = ["block", *(f"{dtype}, vocabulary {size:,}" for dtype, size in columns)]
    return (
        "\n\n**generate**, batch 1: tokens a second over those of transformers' Llama of the same "
        "shape, and in brackets bytes read over its.\n\n" + markdown_table(heads, rows)
    )
