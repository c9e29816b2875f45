"""scripts/benchmarks.md and the performance table of README.md, from `kanlm bench`.

1. Each benchmark runs in a process of its own and leaves a results.json.
2. These are kept, all together, in scripts/benchmarks.json.
3. From that file alone all figures are written to scripts/benchmarks.md, and a digest to README.md
   between two marks.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kanlm.reporting.format import count, fixed

ROOT = Path(__file__).resolve().parent.parent
JSON = ROOT / "scripts" / "benchmarks.json"
MARKDOWN = ROOT / "scripts" / "benchmarks.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- ./scripts/benchmarks writes from here -->", "<!-- to here -->"
#: In the order of the section.
NAMES = ("layers", "step", "decode", "peers", "data", "growth")

Results = Mapping[str, Any]


def page(benchmarks: Mapping[str, Results]) -> str:
    """All figures, in Markdown."""
    parts = ["# Speed and memory", _made_with(benchmarks)]
    parts += [_WRITERS[name](benchmarks[name]) for name in NAMES if name in benchmarks]
    return "\n\n".join(parts) + "\n"


def digest(benchmarks: Mapping[str, Results]) -> str:
    """The figures that matter most, of the default `kan` and of `kan-local`.

    Raises:
        KeyError: one of layers, step and decode has not been measured.
    """
    layers, step, decode = (benchmarks[name] for name in ("layers", "step", "decode"))
    widths = layers["settings"]["widths"]
    memory = _saved_by_mlp(layers)
    rows = []
    for mode in ("compiled", "eager"):
        cells = [
            " / ".join(
                fixed(row["time_ratio"]["median"], 2) for row in _of(layers, block, mode=mode)
            )
            for block in ("kan/hermite", "kan/bspline")
        ]
        what = f"block forward and backward, {mode}, × compiled GELU MLP's time, d_model "
        rows.append([what + " / ".join(map(str, widths)), *cells, "1"])
    kept = [
        fixed(
            max(r["saved_bytes"] / memory[r["d_model"]] for r in _of(layers, block, mode="eager")),
            2,
        )
        for block in ("kan/hermite", "kan/bspline")
    ]
    rows.append(["bytes kept for backward, × GELU MLP's", *kept, ""])
    for mode in ("compiled", "eager"):
        speeds = [
            fixed(_of(step, block, mode=mode)[0]["speed_ratio"]["median"], 2)
            for block in ("kan/hermite", "kan/bspline")
        ]
        rows.append([f"whole model training, {mode}, × SwiGLU model's tokens/s", *speeds, ""])
    local = "kan/bspline1-g6-silu"
    for dtype in decode["settings"]["dtypes"]:
        row = _of(decode, local, what="blocks", dtype=dtype, batch_size=1)[0]
        time = fixed(row["time_ratio"]["median"], 2)
        what = f"decoding, feed-forward blocks, {dtype}, batch 1, × GELU MLP's time"
        rows.append([what, "", time, fixed(row["bytes_ratio"], 2)])
        size = decode["settings"]["vocab_sizes"][1]
        row = _of(decode, local, what="model", dtype=dtype, vocab_size=size)[0]
        time = fixed(row["time_ratio"]["median"], 2)
        what = f"decoding, whole model, vocabulary {size:,}, {dtype}, × GELU model's time"
        rows.append([what, "", time, fixed(row["bytes_ratio"], 2)])
    for row in _of(decode, "swiglu", what="generate") if _has(decode, "swiglu") else ():
        keys = {key: row[key] for key in ("what", "dtype", "vocab_size")}
        speeds = [
            fixed(_of(decode, block, **keys)[0]["speed_ratio"]["median"], 2)
            for block in ("kan/hermite", local)
        ]
        what = f"generate, vocabulary {row['vocab_size']:,}, {row['dtype']}, × Llama's tokens/s"
        rows.append([what, *speeds, ""])
    heads = ["", "`kan`", "`kan-local`", "floor"]
    shown = {name: benchmarks[name] for name in ("layers", "step", "decode")}
    return "\n".join([_made_with(shown), "", _table(heads, rows)])


def _of(results: Results, block: str, **values: Any) -> list[Mapping[str, Any]]:
    """Rows of the first block whose label begins so, that have all these values."""
    name = next(r["block"] for r in results["rows"] if r["block"].startswith(block))
    return [
        row
        for row in results["rows"]
        if row["block"] == name and all(row.get(key) == value for key, value in values.items())
    ]


def _has(results: Results, block: str) -> bool:
    return any(row["block"].startswith(block) for row in results["rows"])


def _saved_by_mlp(layers: Results) -> dict[int, int]:
    """d_model → bytes that the eager MLP keeps for backward."""
    return {row["d_model"]: row["saved_bytes"] for row in _of(layers, "gelu", mode="eager")}


def written(readme: str, text: str) -> str:
    """README.md with a new text between the marks.

    Raises:
        ValueError: a mark is missing.
    """
    before, found, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (found and end):
        raise ValueError(f"README.md: expected {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def _made_with(benchmarks: Mapping[str, Results]) -> str:
    made: dict[str, list[str]] = {}
    for name, results in benchmarks.items():
        provenance = results["provenance"]
        hardware = provenance["hardware"]
        where = (
            f"at commit {str(provenance['commit'])[:7]}: {hardware['cpu']}, "
            f"{hardware['cores']} cores, torch {provenance['versions']['torch']}"
        )
        made.setdefault(where, []).append(name)
    places = [
        where if len(made) == 1 else f"{', '.join(names)} {where}" for where, names in made.items()
    ]
    return (
        f"Written by `./scripts/benchmarks` {'; '.join(places)}. Times are medians of "
        "ratios of what took turns in one process; repeated, they move by about 0.05. The floor "
        "stands beside what has one."
    )


def _layers(results: Results) -> str:
    settings, rows = results["settings"], results["rows"]
    widths = settings["widths"]
    memory = _saved_by_mlp(results)

    def cells(block: str, mode: str) -> list[str]:
        own = [row for row in rows if (row["block"], row["mode"]) == (block, mode)]
        times = [fixed(row["time_ratio"]["median"], 2) for row in own]
        kept = {fixed(row["saved_bytes"] / memory[row["d_model"]], 2) for row in own}
        return [block, mode, *times, "–".join(sorted(kept))]

    keys = dict.fromkeys((row["block"], row["mode"]) for row in rows)
    heads = ["block", "mode", *(f"d_model {w}" for w in widths), "memory"]
    return (
        f"**A block, forward and backward**, {settings['tokens']:,} tokens, {settings['dtype']}, "
        "equal parameters: time over that of the *compiled* GELU MLP (floor 1: equally many "
        "multiply-adds), and bytes kept for backward over the eager MLP's.\n\n"
        + _table(heads, [cells(*key) for key in keys])
    )


def _step(results: Results) -> str:
    settings = results["settings"]
    rows = [
        [
            row["block"],
            row["mode"],
            fixed(row["speed_ratio"]["median"], 2),
            *([fixed(row["time_over_llama"]["median"], 2)] if "time_over_llama" in row else []),
            count(row["tokens_per_second"]),
            count(row["flops"] / row["seconds"], "FLOP/s"),
        ]
        for row in results["rows"]
    ]
    beside = ["× Llama's time"] if "time_over_llama" in results["rows"][0] else []
    heads = ["blocks", "mode", "× SwiGLU's tokens/s", *beside, "tokens/s", "multiply-adds ×2"]
    return (
        f"**A training step of a whole model** with AdamW: {settings['n_layers']} layers, d_model "
        f"{settings['d_model']}, vocabulary {settings['vocab_size']:,}, {settings['batch_size']} × "
        f"{settings['context_length']} tokens, beside the SwiGLU model of the same mode.\n\n"
        + _table(heads, rows)
    )


def _decode(results: Results) -> str:
    settings, rows = results["settings"], results["rows"]
    sizes = settings["batch_sizes"]
    blocks = dict.fromkeys(row["block"] for row in rows if row["what"] == "blocks")

    def of(**values: Any) -> list[Mapping[str, Any]]:
        return [row for row in rows if all(row.get(k) == v for k, v in values.items())]

    def times(found: Iterable[Mapping[str, Any]]) -> list[str]:
        return [
            count(row["bytes_per_second"], "B/s")
            if row["block"].startswith("gelu")
            else fixed(row["time_ratio"]["median"], 2)
            for row in found
        ]

    keys = [(block, dtype) for dtype in settings["dtypes"] for block in blocks]
    by_batch = [
        [
            block,
            dtype,
            fixed(of(what="blocks", block=block, dtype=dtype)[0]["bytes_ratio"], 2),
            *times(of(what="blocks", block=block, dtype=dtype)),
        ]
        for block, dtype in keys
    ]
    by_vocabulary = [
        [
            block,
            dtype,
            *map(_speed, of(what="model", block=block, dtype=dtype)),
        ]
        for block, dtype in keys
    ]
    heads = ["block", "dtype", "bytes", *(f"batch {size}" for size in sizes)]
    vocabularies = [f"vocabulary {size:,}" for size in settings["vocab_sizes"]]
    return (
        f"**Decoding, feed-forward blocks alone**: {settings['n_layers']} layers, d_model "
        f"{settings['d_model']}, a new input every step: time over the GELU MLP's by batch size, "
        "and how fast the MLP reads its weights. The floor at batch 1 is the share of the MLP's "
        "bytes that are read. The MLP is torch's own; where it reads several times more slowly "
        "than at batch 1, it waits for its products, which on processors without instructions for "
        "bfloat16 are slow, and a ratio there says more of them than of KANs.\n\n"
        + _table(heads, by_batch)
        + "\n\n**Decoding, whole models**, batch 1: tokens a second, and in brackets that over "
        "what a model would reach that reads its own bytes as fast as the MLP's model reads "
        "its.\n\n"
        + _table(["block", "dtype", *vocabularies], by_vocabulary)
        + _few_tokens(results)
        + _generate(results)
    )


def _few_tokens(results: Results) -> str:
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
        "inputs every time and weights out of cache.\n\n" + _table(heads, rows)
    )


def _generate(results: Results) -> str:
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
        "shape, and in brackets bytes read over its.\n\n" + _table(heads, rows)
    )


def _speed(row: Mapping[str, Any]) -> str:
    share = fixed(row["share_of_allowed_speed"], 2)
    return f"{fixed(1 / row['seconds_per_token'], 1)} ({share})"


def _peers(results: Results) -> str:
    settings, rows = results["settings"], results["rows"]
    table = [
        [
            row["peer"],
            f"{row['tokens']:,}",
            row["mode"],
            fixed(row["time_ratio"]["median"], 2),
            count(row["saved_bytes"], "B"),
            count(ours["saved_bytes"], "B"),
        ]
        for ours, row in zip(rows[::2], rows[1::2], strict=True)
    ]
    heads = ["layer", "tokens", "mode", "× our time", "keeps for backward", "ours keeps"]
    return (
        f"**Other repositories' layers**, {settings['in_features']} → {settings['out_features']}, "
        f"{settings['grid_size']} cells, degree {settings['degree']}: time over that of a "
        "`KANLinear` with functions of the same sort, in the same mode.\n\n" + _table(heads, table)
    )


def _data(results: Results) -> str:
    rows = [
        [
            row["what"] + (f", context {row['context_length']}" if "context_length" in row else ""),
            row["tokenizer"],
            fixed(row["speed_ratio"]["median"], 2),
            count(row["tokens_per_second"]),
        ]
        for row in results["rows"]
    ]
    heads = ["what", "tokenizer", "× floor's speed", "tokens/s"]
    return (
        "**Text on its way to a model**: preparing, beside `tokenizers` alone on all cores; "
        "cutting batches, beside numpy copying them.\n\n" + _table(heads, rows)
    )


def _growth(results: Results) -> str:
    rows = [
        [
            row["block"],
            row["axis"],
            f"{row['sizes'][0]:,} to {row['sizes'][-1]:,}",
            f"{fixed(row['exponent'], 2)} ± {fixed(row['standard_error'], 2)}",
            fixed(row["flops_exponent"], 2),
        ]
        for row in results["rows"]
    ]
    return (
        "**Growth**: p of time ∝ sizeᵖ, forward and backward, eager, and p of the FLOPs.\n\n"
        + _table(["block", "size", "from", "p ± standard error", "p of FLOPs"], rows)
    )


_WRITERS = {
    "layers": _layers,
    "step": _step,
    "decode": _decode,
    "peers": _peers,
    "data": _data,
    "growth": _growth,
}


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Run what is asked for, and write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="BENCHMARK", help=f"default: all, {' '.join(NAMES)}"
    )
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument(
        "--write-only", action="store_true", help="measure nothing, write from the JSON"
    )
    options = parser.parse_args()
    unknown = set(options.names) - set(NAMES)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {' '.join(NAMES)}")
    kept = json.loads(JSON.read_text()) if JSON.exists() else {}
    for name in () if options.write_only else options.names or NAMES:
        folder = ROOT / "runs" / "bench" / name
        command = [sys.executable, "-m", "kanlm", "bench", name, f"output_dir={folder}"]
        peers = [f"--peer={peer}" for peer in options.peer] if name == "peers" else []
        subprocess.run([*command, *peers], check=True)
        kept[name] = json.loads((folder / "results.json").read_text())
        # Where it lies on this machine is nobody's business.
        kept[name]["settings"] = {
            key: value
            for key, value in kept[name]["settings"].items()
            if key not in ("output_dir", "peers")
        }
    # All at the end: the benchmarks after the first would find a tree with changes.
    JSON.write_text(json.dumps(kept, indent=1) + "\n")
    MARKDOWN.write_text(page(kept))
    README.write_text(written(README.read_text(), digest(kept)))


if __name__ == "__main__":
    main()
