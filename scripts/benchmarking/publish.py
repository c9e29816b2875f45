"""`./scripts/benchmarks`: scripts/benchmarks.md and the performance table of README.md.

1. Each benchmark runs in a process of its own and leaves a results.json.
2. These are kept, all together, in scripts/benchmarks.json.
3. From that file alone all figures are written to scripts/benchmarks.md, and a digest to README.md
   between two marks.
"""

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarking import BENCHMARKS
from benchmarking.report import Results, markdown_table, of_block, saved_by_mlp
from kanlm.reporting.format import fixed

ROOT = Path(__file__).resolve().parents[2]
JSON = ROOT / "scripts" / "benchmarks.json"
MARKDOWN = ROOT / "scripts" / "benchmarks.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- ./scripts/benchmarks writes from here -->", "<!-- to here -->"


def page(benchmarks: Mapping[str, Results]) -> str:
    """Write all figures in Markdown."""
    parts = ["# Speed and memory", _made_with(benchmarks)]
    for name in BENCHMARKS:
        if name in benchmarks:
            section = importlib.import_module(f"benchmarking.{name}").section
            parts.append(section(benchmarks[name]))
    return "\n\n".join(parts) + "\n"


def digest(benchmarks: Mapping[str, Results]) -> str:
    """Tabulate the figures that matter most, of the default `kan` and of `kan-local`.

    Raises:
        KeyError: one of layers, step and decode has not been measured.
    """
    layers, step, decode = (benchmarks[name] for name in ("layers", "step", "decode"))
    widths = layers["settings"]["widths"]
    memory = saved_by_mlp(layers)
    rows = []
    for mode in ("compiled", "eager"):
        cells = [
            " / ".join(
                fixed(row["time_ratio"]["median"], 2) for row in of_block(layers, block, mode=mode)
            )
            for block in ("kan/hermite", "kan/bspline")
        ]
        what = f"block forward and backward, {mode}, × compiled GELU MLP's time, d_model "
        rows.append([what + " / ".join(map(str, widths)), *cells, "1"])
    kept = [
        fixed(
            max(
                r["saved_bytes"] / memory[r["d_model"]]
                for r in of_block(layers, block, mode="eager")
            ),
            2,
        )
        for block in ("kan/hermite", "kan/bspline")
    ]
    rows.append(["bytes kept for backward, × GELU MLP's", *kept, ""])
    for mode in ("compiled", "eager"):
        speeds = [
            fixed(of_block(step, block, mode=mode)[0]["speed_ratio"]["median"], 2)
            for block in ("kan/hermite", "kan/bspline")
        ]
        rows.append([f"whole model training, {mode}, × SwiGLU model's tokens/s", *speeds, ""])
    local = "kan/bspline1-g6-silu"
    for dtype in decode["settings"]["dtypes"]:
        row = of_block(decode, local, what="blocks", dtype=dtype, batch_size=1)[0]
        time = fixed(row["time_ratio"]["median"], 2)
        what = f"decoding, feed-forward blocks, {dtype}, batch 1, × GELU MLP's time"
        rows.append([what, "", time, fixed(row["bytes_ratio"], 2)])
        size = decode["settings"]["vocab_sizes"][1]
        row = of_block(decode, local, what="model", dtype=dtype, vocab_size=size)[0]
        time = fixed(row["time_ratio"]["median"], 2)
        what = f"decoding, whole model, vocabulary {size:,}, {dtype}, × GELU model's time"
        rows.append([what, "", time, fixed(row["bytes_ratio"], 2)])
    for row in of_block(decode, "swiglu", what="generate") if _has(decode, "swiglu") else ():
        keys = {key: row[key] for key in ("what", "dtype", "vocab_size")}
        speeds = [
            fixed(of_block(decode, block, **keys)[0]["speed_ratio"]["median"], 2)
            for block in ("kan/hermite", local)
        ]
        what = f"generate, vocabulary {row['vocab_size']:,}, {row['dtype']}, × Llama's tokens/s"
        rows.append([what, *speeds, ""])
    heads = ["", "`kan`", "`kan-local`", "floor"]
    shown = {name: benchmarks[name] for name in ("layers", "step", "decode")}
    return "\n".join([_made_with(shown), "", markdown_table(heads, rows)])


def _has(results: Results, block: str) -> bool:
    return any(row["block"].startswith(block) for row in results["rows"])


def written(readme: str, text: str) -> str:
    """Put a new text between the marks of README.md.

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


def main() -> None:
    """Run what is asked for, and write both files."""
    parser = argparse.ArgumentParser(
        prog="./scripts/benchmarks", description="Measure, and publish the figures."
    )
    parser.add_argument(
        "names", nargs="*", metavar="BENCHMARK", help=f"default: all, {' '.join(BENCHMARKS)}"
    )
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument(
        "--write-only", action="store_true", help="measure nothing, write from the JSON"
    )
    options = parser.parse_args()
    unknown = set(options.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {' '.join(BENCHMARKS)}")
    kept = json.loads(JSON.read_text()) if JSON.exists() else {}
    for name in () if options.write_only else options.names or BENCHMARKS:
        folder = ROOT / "runs" / "bench" / name
        command = [sys.executable, "-m", "benchmarking", name, f"output_dir={folder}"]
        peers = [f"peers.{peer}" for peer in options.peer] if name == "peers" else []
        subprocess.run([*command, *peers], check=True, cwd=ROOT)
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
