"""Tables and figures of a benchmark's results.json."""

from collections.abc import Callable, Mapping
from typing import Any

from kanlm.reporting.bench.data import data_tables
from kanlm.reporting.bench.decode import decode_figures, decode_tables
from kanlm.reporting.bench.growth import growth_figures, growth_tables
from kanlm.reporting.bench.layers import layer_figures, layer_tables
from kanlm.reporting.bench.peers import peer_tables
from kanlm.reporting.bench.step import step_tables
from kanlm.reporting.figures import Picture
from kanlm.reporting.table import Table

_TABLES: dict[str, Callable[[Mapping[str, Any]], list[Table]]] = {
    "layers": layer_tables,
    "step": step_tables,
    "decode": decode_tables,
    "data": data_tables,
    "peers": peer_tables,
    "growth": growth_tables,
}
_FIGURES: dict[str, Callable[[Mapping[str, Any]], list[Picture]]] = {
    "layers": layer_figures,
    "decode": decode_figures,
    "growth": growth_figures,
}


def benchmark_tables(results: Mapping[str, Any]) -> list[Table]:
    """All rows of a benchmark."""
    return _TABLES[results["benchmark"]](results)


def benchmark_figures(results: Mapping[str, Any]) -> list[Picture]:
    """Figures of a benchmark, each an SVG of its own."""
    draw = _FIGURES.get(results["benchmark"])
    return [] if draw is None else draw(results)
