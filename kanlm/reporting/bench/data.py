"""Text on its way to batches: one table."""

from collections.abc import Mapping
from typing import Any

from kanlm.reporting.bench.parts import rules, where
from kanlm.reporting.format import count, fixed, span
from kanlm.reporting.table import Table


def data_tables(results: Mapping[str, Any]) -> list[Table]:
    """A row a tokenizer, then one a context length."""
    groups = [where(results, what=what) for what in ("preparing", "batches")]

    def cells(row: Mapping[str, Any]) -> list[str]:
        length = row.get("context_length")
        return [
            row["what"] + ("" if length is None else f" of {row['batch_size']} × {length}"),
            row["tokenizer"],
            fixed(row["speed_ratio"]["median"], 2),
            span([row["speed_ratio"]["low"], row["speed_ratio"]["high"]], 2),
            count(row["tokens_per_second"]),
            fixed(row.get("megabytes_per_second"), 1),
            count(row.get("peak_memory_bytes"), "B"),
        ]

    text = groups[0][0]
    table = Table(
        title=f"{text['megabytes']:.1f} MB of {results['settings']['source']} "
        f"in {text['documents']:,} documents",
        columns=["what", "tokenizer", "× floor", "quartiles", "tokens/s", "MB/s", "memory"],
        rows=[cells(row) for group in groups for row in group],
        note="Speed over that of a floor: for preparing (read, tokenise, write) the tokenizers "
        "library given all documents at once, on all cores; for batches numpy copying one. "
        "Memory is what preparing adds to a process at most.",
        rules=rules(groups),
    )
    return [table]
