"""Files of rows, one column of which is the text: JSONL, JSON, CSV, TSV and parquet.

All give None for a row whose text is missing: null, an empty field of a CSV, or no such key.
"""

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from kanlm.data.sources.packing import CHUNK_BYTES, opened, packing
from kanlm.data.sources.text import decoded
from kanlm.errors import UserError, first_line, nearest

#: Rows of which one must have the column, or it is taken for misspelt.
_FIRST_ROWS = 1000
#: Characters at the end of a text whose JSON may be incomplete rather than wrong.
_UNSETTLED = 16

#: Stands for what a row does not have.
ABSENT: Any = object()

_BLANK = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()

#: How the rows of a .json file may stand in it.
Layout = Literal["lines", "array", "objects"]

# A document may be longer than the 131,072 characters that are the module's default.
csv.field_size_limit(sys.maxsize)


def jsonl(path: Path, column: str) -> Iterator[str | None]:
    """Yield the column of every line, blank lines apart."""
    return _column(path, _json_lines(path), column)


def json_rows(path: Path, column: str) -> Iterator[str | None]:
    """Yield the column of every object in a file that holds them in one of three ways."""
    layout = json_layout(path)
    rows = _json_lines(path) if layout == "lines" else _json_values(path, layout)
    return _column(path, rows, column)


def json_layout(path: Path) -> Layout:
    """Look how the objects of a JSON file stand in it: a line each, in an array, or else."""
    with opened(path) as file:
        head = file.read(CHUNK_BYTES)
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"["):
        return "array"
    if not head.startswith(b"{"):
        raise UserError(f"{path}: expected JSON objects, a line each or in an array")
    try:
        json.loads(head.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return "objects"
    return "lines"


def comma_separated(path: Path, column: str) -> Iterator[str | None]:
    """Yield the column of every row of a CSV file, whose first row names the columns."""
    return _delimited(path, column, ",")


def tab_separated(path: Path, column: str) -> Iterator[str | None]:
    """Yield the column of every row of a TSV file, whose first row names the columns."""
    return _delimited(path, column, "\t")


def parquet_rows(path: Path, column: str) -> Iterator[str | None]:
    """Yield the column of every row; a name with a dot may be that of a field in a struct."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    if packing(path):
        raise UserError(f"{path}: parquet inside {packing(path)}; decompress it to .parquet")
    try:
        with parquet.ParquetFile(path) as file:
            top = _top_name(file.schema_arrow, column, path)
            # A dot in a name selects fields of structs as well as columns.
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(batch.schema.names.index(top)).to_pylist():
                    number += 1
                    where = f"{path}, row {number}"
                    yield checked_text(field({top: value}, column, where), column, where)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, after row {number}: not UTF-8: {first_line(error)}") from None
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: cannot be read as parquet: {reason}") from None


#: Format → what yields the column of a file's rows.
READERS: dict[str, Callable[[Path, str], Iterator[str | None]]] = {
    "jsonl": jsonl,
    "json": json_rows,
    "csv": comma_separated,
    "tsv": tab_separated,
    "parquet": parquet_rows,
}


def field(row: Mapping[str, Any], column: str, where: str) -> Any:
    """Return what a row has under a name, or, where it has none such, along a path of names.

    Args:
        row: the row.
        column: a name, or names with dots between.
        where: the row's place, for errors.

    Returns:
        The value, or `ABSENT`.

    Raises:
        UserError: there are several paths that are spelt so.
    """
    if column in row:
        return row[column]
    found = []
    for dot in re.finditer(r"\.", column):
        inner = row.get(column[: dot.start()])
        if isinstance(inner, Mapping):
            found.append(field(inner, column[dot.end() :], where))
    found = [value for value in found if value is not ABSENT]
    if len(found) > 1:
        raise UserError(f"{where}: column '{column}' may be any of {len(found)} fields")
    return found[0] if found else ABSENT


def checked_text(value: Any, column: str, where: str) -> str | None:
    """Return a text, or None of null or `ABSENT`.

    Raises:
        UserError: it is something else, or no text that UTF-8 can spell.
    """
    if value is None or value is ABSENT:
        return None
    if not isinstance(value, str):
        raise UserError(f"{where}: column '{column}' holds {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise UserError(
            f"{where}: column '{column}' holds half a character, \\u{code:04x}"
        ) from None
    return value


def _column(path: Path, rows: Iterator[tuple[str, Any]], column: str) -> Iterator[str | None]:
    """Yield the column of rows of JSON, which come with their places."""
    names: dict[str, None] = {}
    known, number = False, 0
    for number, (where, row) in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object with the column '{column}'")
        value = field(row, column, where)
        known = known or value is not ABSENT
        if not known:
            names.update(dict.fromkeys(row))
            if number == _FIRST_ROWS:
                break
        yield checked_text(value, column, where)
    if number and not known:
        some = f"{number} row" + ("s" if number > 1 else "")
        raise UserError(f"{path}: no column '{column}' in {some}{_expected(column, names)}")


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place and value of every line that is not blank."""
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                text = line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = f"byte {error.start} of the line is 0x{line[error.start]:02x}"
                raise UserError(f"{where}: not UTF-8: {byte}") from None
            with _explained(where):
                value = json.loads(text)
            yield where, value


def _json_values(path: Path, layout: Layout) -> Iterator[tuple[str, Any]]:
    """Yield the place and value of the objects in an array, or of any that follow one another."""
    text = _Values(decoded(path))
    if layout == "array":
        text.skip("[")
    number, more = 0, text.peek() not in ("", "]")
    while more:
        number += 1
        where = f"{path}, object {number}"
        with _explained(where):
            value = text.value()
        yield where, value
        more = text.skip(",") if layout == "array" else bool(text.peek())
    if (layout == "array" and not text.skip("]")) or text.peek():
        found = text.peek() or "the end of the file"
        raise UserError(f"{path}: malformed JSON: {found} after object {number}")


class _Values:
    """JSON values one after another in a text that comes in chunks."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self._chunks = chunks
        self._held, self._at = "", 0

    def peek(self) -> str:
        """Return the next character that is not blank, or "" at the end."""
        while True:
            blank = _BLANK.match(self._held, self._at)
            assert blank is not None
            self._at = blank.end()
            if self._at < len(self._held):
                return self._held[self._at]
            if not self._read_on():
                return ""

    def skip(self, character: str) -> bool:
        """Go past the next character if it is this."""
        found = self.peek() == character
        self._at += found
        return found

    def value(self) -> Any:
        """Return the next value and go past it.

        Raises:
            json.JSONDecodeError: there is none.
        """
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._held, self._at)
            except json.JSONDecodeError as error:
                at_end = error.pos >= len(self._held) - _UNSETTLED
                if (at_end or error.msg.startswith("Unterminated")) and self._read_on():
                    continue
                raise
            # A number may have more digits.
            if end == len(self._held) and self._read_on():
                continue
            self._at = end
            return value

    def _read_on(self) -> bool:
        """Read as much as is held, so that trying again stays proportional to the text."""
        parts = [self._held[self._at :]]
        wanted, found = max(len(parts[0]), 1), 0
        for chunk in self._chunks:
            parts.append(chunk)
            found += len(chunk)
            if found >= wanted:
                break
        self._held, self._at = "".join(parts), 0
        return found > 0


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turn what json raises into one line."""
    try:
        yield
    except json.JSONDecodeError as error:
        problem = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise UserError(f"{where}: malformed JSON: {problem}") from None
    except (ValueError, RecursionError) as error:
        # Brackets in brackets, or a number of thousands of digits.
        raise UserError(f"{where}: cannot be read: {first_line(error)}") from None


def _delimited(path: Path, column: str, delimiter: str) -> Iterator[str | None]:
    """Yield the column of every row but the first, which names it; blank lines are no rows."""
    reader = csv.reader(_lines(decoded(path)), delimiter=delimiter, strict=True)
    try:
        names = next(reader, None)
        if names is None:
            return
        if names.count(column) != 1:
            several = f"{names.count(column)} columns are named '{column}'"
            raise UserError(
                f"{path}: {several}"
                if column in names
                else f"{path}: no column '{column}'{_expected(column, names)}"
            )
        place = names.index(column)
        for row in reader:
            if not row:
                continue
            if len(row) != len(names):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(row)} fields, expected the "
                    f"{len(names)} of the first row"
                )
            yield row[place] or None
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: malformed: {error}") from None


def _lines(chunks: Iterator[str]) -> Iterator[str]:
    """Divide a text that comes in chunks after every newline."""
    held: list[str] = []
    for chunk in chunks:
        *lines, rest = chunk.split("\n")
        for line in lines:
            yield "".join([*held, line, "\n"])
            held = []
        held.append(rest)
    if last := "".join(held):
        yield last


def _top_name(schema: Any, column: str, path: Path) -> str:
    """Return the name of the column that is wanted, or of the one that has it as a field."""
    import pyarrow

    def fields(kind: Any) -> Any:
        if not pyarrow.types.is_struct(kind):
            return None
        return {part.name: fields(part.type) for part in kind}

    if (count := schema.names.count(column)) > 1:
        raise UserError(f"{path}: {count} columns are named '{column}'")
    tree = {part.name: fields(part.type) for part in schema}
    if field(tree, column, str(path)) is ABSENT:
        raise UserError(f"{path}: no column '{column}'{_expected(column, tree)}")
    heads = [column, *(column[: dot.start()] for dot in re.finditer(r"\.", column))]
    found = (name for name in heads if name in tree)
    return next(n for n in found if field({n: tree[n]}, column, str(path)) is not ABSENT)


def _expected(column: str, names: Iterable[str]) -> str:
    """The nearest of the columns that there are, and how one is named."""
    return f"{nearest(column, names)} (as {{kind: files, path: …, column: NAME}})"
