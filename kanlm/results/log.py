"""Reading metrics.jsonl, one line an event of a run."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kanlm.errors import UserError
from kanlm.results.schema import LARGEST
from kanlm.untrusted_io import parse_object, read_bytes

#: What is shown of a line, by its kind, and of which types that is.
_SHOWN: dict[str, dict[str, type]] = {
    "train": {"bits_per_byte": float},
    "validation": {"domain": str, "bits_per_byte": float},
    "sample": {"prompt": str, "text": str},
}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read the lines of metrics.jsonl, but for what a kill left behind the last whole one.

    A loss that is no finite number is NaN, which a curve leaves out.

    Raises:
        UserError: the file cannot be read, or a whole line is not one that a run writes.
    """
    *lines, _ = read_bytes(path).split(b"\n")
    for number, text in enumerate(lines, 1):
        try:
            yield _line(text)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None


def _line(text: bytes) -> dict[str, Any]:
    try:
        line = parse_object(text, finite=False)
    except ValueError:
        raise ValueError("expected a JSON object") from None
    if not isinstance(line.get("kind"), str):
        raise ValueError("expected a kind")
    step = line.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**53:
        raise ValueError("expected a step, a whole number")
    for name, kind in _SHOWN.get(line["kind"], {}).items():
        value = line.get(name)
        if kind is float:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"expected a number for {name}")
            line[name] = float(value) if abs(value) <= LARGEST else math.nan
        elif not isinstance(value, kind):
            raise ValueError(f"expected text for {name}")
    return line
