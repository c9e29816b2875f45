"""Reading results.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kanlm.config.checking import check
from kanlm.errors import UserError
from kanlm.results.consistency import problem
from kanlm.results.schema import RUN_FACTS, SCHEMA_VERSION, Note, Record, Results
from kanlm.untrusted_io import read_object


def read_results(path: Path) -> dict[str, Any]:
    """Read results.json. A single run's is that of a study of one arm with one stage.

    Raises:
        UserError: it cannot be read, is of another version, or holds something else.
    """
    results = read_object(path)
    version = results.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema_version is {version!r}, expected {SCHEMA_VERSION}: another version "
            "of kanlm wrote it; read it with that one, or make it anew"
        )
    check(Results, results, str(path))
    if (found := problem(results)) is not None:
        raise UserError(f"{path} is damaged: {found}")
    return results


def read_run_results(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a single run's results.json, and of that the facts of its one arm, none unknown.

    Raises:
        UserError: see `read_results`; or it is a study's, or a fact is missing.
    """
    results = read_results(path)
    if len(results["arms"]) != 1:
        raise UserError(f"{path} holds {len(results['arms'])} arms: it is not a single run's")
    [(name, facts)] = results["arms"].items()
    unknown = [fact for fact in RUN_FACTS if facts.get(fact) is None]
    if unknown:
        raise UserError(f"{path}.arms.{name}.{unknown[0]} = null: expected what a single run knows")
    return results, facts


def notes_of(results: Mapping[str, Any]) -> list[Note]:
    """Return the notes in what results.json holds."""
    return [
        Note(**{name: note[name] for name in Note.__dataclass_fields__})
        for note in results["notes"]
    ]


def records_of(results: Mapping[str, Any]) -> list[Record]:
    """Return the records in what results.json holds."""
    names = Record.__dataclass_fields__
    return [Record(**{name: record[name] for name in names}) for record in results["records"]]
