"""Local text, JSONL and parquet, compressed or not, read in bounded memory."""

import bz2
import codecs
import glob
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

from kanlm.data.sources.base import Cursor, Source, hash_json, is_blank
from kanlm.errors import UserError, first_line, nearest

CHUNK_BYTES = 2**20

JSONL = (".jsonl", ".ndjson")
PARQUET = ".parquet"


def _open_zstandard(path: Path) -> io.BufferedReader:
    import pyarrow

    # The zstandard package takes a truncated file for a whole one; this does not.
    stream: Any = pyarrow.input_stream(path, compression="zstd")
    return io.BufferedReader(stream)


#: Suffix → what opens such a file for reading the bytes packed in it.
OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}


class Files(Source):
    """Files by path or glob; `**` goes down folders. The suffix tells the format.

    `.jsonl`, `.ndjson` and `.parquet` hold one document a row, anything else is UTF-8
    text; `.gz`, `.bz2`, `.xz` and `.zst` after that are decompressed.

    Args:
        path: a path or glob, or several; read in sorted order.
        column: field of JSONL or parquet that holds the text.
        separator: what stands between documents of a text file; null makes every file
            one document.
    """

    def __init__(
        self,
        root: str | Path = ".",
        *,
        path: str | list[str],
        column: str = "text",
        separator: str | None = None,
    ) -> None:
        super().__init__(root)
        if separator == "":
            raise UserError("data.sources.files.separator = '': expected some text, or null")
        self.patterns = [path] if isinstance(path, str) else path
        self.column = column
        self.separator = separator
        self.files = _find(self.patterns, self.root)
        stem = self.files[0].name.split(".")[0] + ("" if len(self.files) == 1 else "-and-more")
        self.label = re.sub(r"[^\w-]+", "-", stem) or "files"

    def read(self, cursor: Cursor | None = None) -> Iterator[tuple[str, Cursor]]:
        start = cursor or {"file": 0, "documents": 0}
        for index in range(start["file"], len(self.files)):
            skip = start["documents"] if index == start["file"] else 0
            for number, text in enumerate(self._documents_of(self.files[index]), start=1):
                if number > skip:
                    yield text, {"file": index, "documents": number}

    def part(self, index: int, count: int) -> Iterator[str]:
        """Divide between files, so that each part has about as many bytes."""
        sizes = [path.stat().st_size for path in self.files]
        total = max(sum(sizes), 1)
        for path, size, end in zip(self.files, sizes, accumulate(sizes), strict=True):
            # A file belongs where its middle falls.
            if min((2 * end - size) * count // (2 * total), count - 1) == index:
                yield from self._documents_of(path)

    def local_files(self) -> list[Path]:
        return self.files

    def fingerprint(self) -> str:
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.files]
        return hash_json(["files", self.column, self.separator, stats])

    def describe(self) -> str:
        between = "" if self.separator is None else f", documents between {self.separator!r}"
        count = f"{len(self.files)} file{'s' if len(self.files) > 1 else ''}"
        return f"{', '.join(self.patterns)} ({count}{between})"

    def chunks(self) -> Iterator[str]:
        return _text(self.files[0]) if self._one_text else super().chunks()

    @property
    def single_document(self) -> bool:
        if self._one_text:
            return not all(map(is_blank, self.chunks()))
        return super().single_document

    @property
    def _one_text(self) -> bool:
        """Whether all is one text file that nothing divides, of any size."""
        whole = len(self.files) == 1 and self.separator is None
        return whole and _format(self.files[0])[0] not in (*JSONL, PARQUET)

    def _documents_of(self, path: Path) -> Iterator[str]:
        rows, number = self._rows(path), 1
        try:
            while (text := next(rows, None)) is not None:
                yield text
                number += 1
        except MemoryError:
            raise UserError(
                f"{path}: document {number} does not fit in memory; divide it"
            ) from None

    def _rows(self, path: Path) -> Iterator[str]:
        kind, packing = _format(path)
        if kind == PARQUET:
            if packing:
                raise UserError(f"{path}: parquet inside {packing}; decompress it to .parquet")
            yield from _parquet(path, self.column)
        elif kind in JSONL:
            with _opened(path) as file:
                yield from _jsonl(path, file, self.column)
        else:
            yield from separated(_text(path), self.separator)


def separated(chunks: Iterator[str], separator: str | None) -> Iterator[str]:
    """Divide a text that comes in chunks, like `str.split`, holding one document at a time.

    Without a separator the whole text is one document.
    """
    if separator is None:
        yield "".join(chunks)
        return
    # `tail` might be the beginning of a separator that the next chunk completes.
    held: list[str] = []
    tail = ""
    for chunk in chunks:
        first, *others = (tail + chunk).split(separator)
        tail = first
        for piece in others:
            yield "".join([*held, tail])
            held, tail = [], piece
        whole = max(len(tail) - len(separator) + 1, 0)
        held.append(tail[:whole])
        tail = tail[whole:]
    yield "".join([*held, tail])


def find_files(pattern: str, root: Path) -> list[Path]:
    """Return the files that a path or glob names, sorted; a name that exists is no glob.

    Args:
        pattern: `~` is the user's folder, and `**` goes down folders.
        root: folder against which it is read where it is relative.
    """
    path = Path(pattern).expanduser()
    full = root / path
    if full.exists():
        return [full] if full.is_file() else []
    if path.is_absolute():
        matches = map(Path, glob.glob(str(path), recursive=True))
    else:
        # The folder's own name may hold what would be read as a pattern.
        matches = (root / found for found in glob.glob(str(path), root_dir=root, recursive=True))
    return sorted(match for match in matches if match.is_file())


def _find(patterns: list[str], root: Path) -> list[Path]:
    """Resolve paths and globs to files, each once by whatever names, sorted within a pattern."""
    found: dict[Path, Path] = {}
    for pattern in patterns:
        files = find_files(pattern, root)
        if not files and (root / Path(pattern).expanduser()).is_dir():
            raise UserError(
                f"data.sources.files.path = '{pattern}': a folder; write '{pattern}/**/*'"
            )
        if not files:
            raise UserError(
                f"data.sources.files.path = '{pattern}': no such file in {root.resolve()}"
            )
        for path in files:
            found.setdefault(path.resolve(), path)
    if not found:
        raise UserError("data.sources.files.path is empty: expected a path or glob")
    return list(found.values())


def _format(path: Path) -> tuple[str, str]:
    """Return the suffix that tells what a file holds, and that of its packing, or ""."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packing = suffixes.pop() if suffixes and suffixes[-1] in OPENERS else ""
    return suffixes[-1] if suffixes else "", packing


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, unpacked, and turn what goes wrong in reading it into one line."""
    packing = _format(path)[1]
    try:
        with OPENERS[packing](path) if packing else path.open("rb") as file:
            yield file
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{path}: cannot be read: {reason}") from None


def _text(path: Path) -> Iterator[str]:
    """Yield a file's UTF-8 text in chunks; a byte-order mark is no part of it."""
    with _opened(path) as file:
        yield from _decoded(path, file, bool(_format(path)[1]))


def _decoded(path: Path, file: IO[bytes], packed: bool) -> Iterator[str]:
    offset, pending, final = 0, b"", False
    while not final:
        chunk = file.read(CHUNK_BYTES)
        final = not chunk
        data = pending + chunk
        try:
            text, used = codecs.utf_8_decode(data, "strict", final)
        except UnicodeDecodeError as error:
            raise UserError(
                _undecodable(path, offset + error.start, data[error.start], packed)
            ) from None
        yield text.removeprefix("\ufeff") if offset == 0 else text
        pending = data[used:]
        offset += used


def _jsonl(path: Path, file: IO[bytes], column: str) -> Iterator[str]:
    """Yield the column of every line, blank lines apart."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            text = line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8")
            row = json.loads(text)
        except UnicodeDecodeError as error:
            byte = f"byte {error.start} of the line is 0x{line[error.start]:02x}"
            raise UserError(f"{where}: not UTF-8: {byte}") from None
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: malformed JSON: {error.msg} at column {error.colno}"
            ) from None
        except (ValueError, RecursionError) as error:
            # Brackets in brackets, or a number of thousands of digits.
            raise UserError(f"{where}: cannot be read: {first_line(error)}") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object with the column '{column}'")
        if column not in row:
            raise UserError(f"{where}: no column '{column}'{nearest(column, row)}")
        yield _checked_text(row[column], column, where)


def _parquet(path: Path, column: str) -> Iterator[str]:
    """Yield the column of every row, nulls apart."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise UserError(
                    f"{path}: no column '{column}'{nearest(column, file.schema_arrow.names)}"
                )
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    if value is not None:
                        yield _checked_text(value, column, f"{path}, row {row}")
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: cannot be read as parquet: {reason}") from None


def _checked_text(value: Any, column: str, where: str) -> str:
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


def _undecodable(path: Path, offset: int, byte: int, packed: bool) -> str:
    inside = " once decompressed" if packed else ""
    return f"{path}: not UTF-8: byte {offset}{inside} is 0x{byte:02x}; convert it, or leave it out"
