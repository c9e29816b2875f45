"""Writing a result: results.json, and documents.jsonl with sums by document beside it."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from kanlm.atomic_io import write_text
from kanlm.errors import UserError
from kanlm.evaluation.perplexity import Evaluation
from kanlm.results.schema import EvaluationKey
from kanlm.untrusted_io import parse_object, read_bytes


def write_results(
    folder: Path, results: Mapping[str, Any], documents: Mapping[EvaluationKey, Evaluation]
) -> None:
    """Write documents.jsonl and then results.json, each whole or not at all.

    Raises:
        UserError: a loss is no finite number, the folder cannot be written, or the disk is full.
    """
    for key, evaluation in documents.items():
        if not np.isfinite(evaluation.nats).all():
            raise UserError(
                f"{folder}: the loss of {key.arm} on {key.domain} is no finite number, and "
                "there are no results to write"
            )
    write_documents(folder / "documents.jsonl", documents)
    write_text(folder / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")


def write_documents(path: Path, documents: Mapping[EvaluationKey, Evaluation]) -> None:
    """Write sums by document, one line an evaluation."""
    lines = [
        json.dumps({**asdict(key), **evaluation.by_document()})
        for key, evaluation in documents.items()
    ]
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_documents(path: Path) -> dict[EvaluationKey, Evaluation]:
    """Read what `write_documents` wrote.

    Raises:
        UserError: the file cannot be read, or a line is not one that was written here.
    """
    *lines, rest = read_bytes(path).split(b"\n")
    documents = {}
    for number, line in enumerate([*lines, rest] if rest else lines, 1):
        try:
            values = parse_object(line, finite=True)
            key = EvaluationKey(
                **{name: values[name] for name in EvaluationKey.__dataclass_fields__}
            )
            documents[key] = _evaluation(values)
        except (ValueError, KeyError, TypeError, OverflowError):
            raise UserError(f"{path}, line {number}: expected sums by document") from None
    return documents


def _evaluation(values: Mapping[str, Any]) -> Evaluation:
    """Sums by document: equally many of each, one at least."""
    nats = np.array(values["nats"])
    counts = {name: np.array(values[name]) for name in ("tokens", "words", "bytes")}
    if nats.ndim != 1 or not len(nats) or nats.dtype.kind not in "fi":
        raise ValueError("nats are no list of numbers")
    for counted in counts.values():
        if counted.shape != nats.shape or counted.dtype != np.int64 or counted.min() < 0:
            raise ValueError("counts are not those of the same documents")
    return Evaluation(nats=nats.astype(np.float64), **counts)
