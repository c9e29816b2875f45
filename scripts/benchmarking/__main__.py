"""`./scripts/bench NAME [SETTING=VALUE…]`: measure, write JSON, print tables and draw figures."""

import argparse
import importlib
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarking import BENCHMARKS
from kanlm.atomic_io import write_text
from kanlm.config import check, merge, parse_override, to_tree
from kanlm.config.documentation import fields_of
from kanlm.errors import UserError

#: Of the layout of a benchmark's JSON.
SCHEMA_VERSION = 1


def bench(name: str, overrides: Sequence[str], report: Callable[[str], object] = print) -> Path:
    """Run a benchmark; return the folder with `results.json` and the figures.

    Args:
        name: one of BENCHMARKS.
        overrides: `setting=value`.

    Raises:
        UserError: a setting is unknown or impossible.
    """
    module = importlib.import_module(f"benchmarking.{name}")
    tree: dict[str, Any] = {}
    for override in overrides:
        tree = merge(tree, parse_override(override))
    settings = check(module.Settings, tree, "")
    from kanlm.experiments.provenance import environment
    from kanlm.reporting.terminal import print_table

    rows = module.measure(settings, report)
    results = {
        "schema_version": SCHEMA_VERSION,
        "benchmark": name,
        "settings": to_tree(settings),
        "provenance": environment(),
        "rows": rows,
    }
    folder = Path(settings.output_dir)
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    for figure in module.figures(results) if hasattr(module, "figures") else ():
        write_text(folder / f"{figure.title}.svg", figure.svg)
    for table in module.tables(results):
        print_table(table)
    return folder


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, run the benchmark, and say where its results are."""
    parser = argparse.ArgumentParser(
        prog="./scripts/bench", description="Measure speed and memory beside a floor."
    )
    verbs = parser.add_subparsers(required=True, metavar="BENCHMARK", dest="name")
    for name, text in BENCHMARKS.items():
        verb = verbs.add_parser(name, help=text, add_help=False)
        verb.add_argument("overrides", nargs="*", metavar="SETTING=VALUE")
        verb.add_argument("--help", action="store_true", help="print what can be set and stop")
    options = parser.parse_args(arguments)
    if options.help:
        print(_settings(options.name))
        return
    try:
        print(bench(options.name, options.overrides) / "results.json")
    except UserError as error:
        sys.exit(f"{parser.prog}: {error}")


def _settings(name: str) -> str:
    """Describe what can be set of a benchmark."""
    module = importlib.import_module(f"benchmarking.{name}")
    about = (module.__doc__ or "").strip()
    lines = [f"usage: ./scripts/bench {name} [SETTING=VALUE …]", "", about, ""]
    for setting in fields_of(module.Settings):
        meaning = f": {setting.meaning}" if setting.meaning else ""
        entry = f"{setting.name} ({setting.type}; default {setting.default}){meaning}"
        lines.append(textwrap.fill(entry, 100, subsequent_indent="  "))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
