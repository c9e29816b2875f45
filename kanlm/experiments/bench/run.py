"""`kanlm bench NAME`: measure, write JSON, print the tables and draw the figures."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kanlm.config import check, merge, parse_override, to_tree
from kanlm.experiments.bench.data import measure_data
from kanlm.experiments.bench.decode import measure_decode
from kanlm.experiments.bench.growth import measure_growth
from kanlm.experiments.bench.layers import measure_layers
from kanlm.experiments.bench.peers import measure_peers
from kanlm.experiments.bench.settings import (
    DataBenchmark,
    DecodeBenchmark,
    GrowthBenchmark,
    LayerBenchmark,
    PeerBenchmark,
    StepBenchmark,
)
from kanlm.experiments.bench.step import measure_step
from kanlm.experiments.provenance import environment
from kanlm.files import write_text
from kanlm.reporting.bench import benchmark_figures, benchmark_tables
from kanlm.reporting.table import print_table

#: Of the layout of a benchmark's JSON.
SCHEMA_VERSION = 1

#: Benchmarks by name: their settings, and what measures.
BENCHMARKS: dict[str, tuple[Any, Callable[..., list[dict]]]] = {
    "layers": (LayerBenchmark, measure_layers),
    "step": (StepBenchmark, measure_step),
    "decode": (DecodeBenchmark, measure_decode),
    "peers": (PeerBenchmark, measure_peers),
    "growth": (GrowthBenchmark, measure_growth),
    "data": (DataBenchmark, measure_data),
}


def bench(name: str, overrides: Sequence[str], report: Callable[[str], object] = print) -> Path:
    """Run a benchmark; return the folder with `results.json` and the figures.

    Arguments:
        name: one of BENCHMARKS.
        overrides: `setting=value`.

    Raises:
        UserError: a setting is unknown or impossible.
    """
    schema, measure = BENCHMARKS[name]
    tree: dict[str, Any] = {}
    for override in overrides:
        tree = merge(tree, parse_override(override))
    settings = check(schema, tree, "")
    rows = measure(settings, report)
    results = {
        "schema_version": SCHEMA_VERSION,
        "benchmark": name,
        "settings": to_tree(settings),
        "provenance": environment(),
        "rows": rows,
    }
    folder = Path(settings.output_dir)
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    for figure in benchmark_figures(results):
        write_text(folder / f"{figure.title}.svg", figure.svg)
    for table in benchmark_tables(results):
        print_table(table)
    return folder
