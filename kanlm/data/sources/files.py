"""Files on this machine, by path or glob: text, or rows with a column of text."""

import glob
import hashlib
import os
import re
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Literal

from kanlm.data.sources.base import Cursor, Source, hash_json, is_blank
from kanlm.data.sources.packing import packing
from kanlm.data.sources.rows import READERS, json_layout
from kanlm.data.sources.text import chunks_of_text, documents_of_text, has_carriage_returns
from kanlm.errors import UserError

Format = Literal["text", "jsonl", "json", "csv", "tsv", "parquet"]

#: Suffix → format; any other is text.
SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".jsonlines": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
#: Suffixes of what is not read → what to do about it.
REFUSED = {
    **dict.fromkeys((".tar", ".tgz", ".tbz2", ".txz", ".zip", ".7z", ".rar"), "unpack it"),
    **dict.fromkeys((".lz4", ".lzma", ".z", ".br", ".sz", ".snappy"), "pack it by zstd or gzip"),
    **dict.fromkeys((".arrow", ".feather", ".orc", ".avro"), "convert it to parquet or JSONL"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save it as CSV"),
    **dict.fromkeys((".pdf", ".epub", ".doc", ".docx", ".odt"), "convert it to text"),
}
#: Bytes at either end of a file that the fingerprint reads.
SAMPLED_BYTES = 4096
#: Files that are looked into for what the notes say.
NOTED_FILES = 64


class Files(Source):
    """Files by path or glob; `**` goes down folders. The suffix tells the format.

    `.jsonl` (`.ndjson`, `.jsonlines`), `.json` (objects a line each, in an array, or one after
    another), `.csv`, `.tsv` and `.parquet` (`.pq`) hold one document a row, anything else is
    UTF-8 text; `.gz`, `.bz2`, `.xz` and `.zst` after that are decompressed.

    Args:
        path: a path or glob, or several; read in sorted order.
        format: of all files, whatever their suffixes.
        column: of rows, the name of the field that holds the text, `text` if null; a name with
            dots may lead into fields of fields. Text files have none.
        separator: of text files, what stands between documents; null makes every file one
            document. Rows have none.
    """

    def __init__(
        self,
        root: str | Path = ".",
        *,
        path: str | list[str],
        format: Format | None = None,
        column: str | None = None,
        separator: str | None = None,
    ) -> None:
        super().__init__(root)
        if separator == "":
            raise UserError("data.sources.files.separator = '': expected some text, or null")
        self.patterns = [path] if isinstance(path, str) else path
        self.format: Format | None = format
        self.column = column or "text"
        # Text has its line ends so, too.
        self.separator = separator and separator.replace("\r\n", "\n").replace("\r", "\n")
        self.files = _find(self.patterns, self.root)
        self._check_options(column)
        self.label = re.sub(r"[^\w-]+", "-", self._name()) or "files"

    def _name(self) -> str:
        """The file's name without suffixes; of several that of the folder that holds them all."""
        first, *others = self.files
        if not others:
            return first.name.split(".")[0]
        return Path(os.path.commonpath([path.absolute().parent for path in self.files])).name

    def read(self, cursor: Cursor | None = None) -> Iterator[tuple[str | None, Cursor]]:
        start = cursor or {"file": 0, "documents": 0}
        for index in range(start["file"], len(self.files)):
            skip = start["documents"] if index == start["file"] else 0
            for number, text in enumerate(self._documents_of(self.files[index]), start=1):
                if number > skip:
                    yield text, {"file": index, "documents": number}

    def part(self, index: int, count: int) -> Iterator[str | None]:
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
        options = [self.format, self.column, self.separator]
        return hash_json(["files", *options, [stamp(path) for path in self.files]])

    def describe(self) -> str:
        formats = {path: self._format_of(path) for path in self.files}
        how = [f"{len(self.files)} file{'s' if len(self.files) > 1 else ''}"]
        if self.separator is not None:
            how.append(f"documents between {self.separator!r}")
        if set(formats.values()) - {"text"}:
            how.append(f"column {self.column}")
        if (first := next((p for p in formats if formats[p] == "json"), None)) is not None:
            standing = {"lines": "a line each", "array": "in an array", "objects": "in a row"}
            how.append(f"JSON objects {standing[json_layout(first)]}")
        return f"{', '.join(self.patterns)} ({', '.join(how)})"

    def chunks(self) -> Iterator[str]:
        if self._one_text:
            return chunks_of_text(self.files[0], stated=self.format is not None)
        return super().chunks()

    def notes(self) -> list[str]:
        notes = []
        if self.separator is not None and self.single_document:
            notes.append(f"the separator {self.separator!r} divides nothing: it is one document")
        texts = [path for path in self.files if self._format_of(path) == "text"]
        if any(map(has_carriage_returns, texts[:NOTED_FILES])):
            notes.append(r"line ends \r\n and \r are read as \n")
        return notes

    @property
    def single_document(self) -> bool:
        if self._one_text:
            return not all(map(is_blank, self.chunks()))
        return super().single_document

    @property
    def _one_text(self) -> bool:
        """Whether all is one text file that nothing divides, of any size."""
        whole = len(self.files) == 1 and self.separator is None
        return whole and self._format_of(self.files[0]) == "text"

    def _format_of(self, path: Path) -> Format:
        by_name: Format = SUFFIXES.get(_inner_suffix(path), "text")
        return self.format or by_name

    def _check_options(self, column: str | None) -> None:
        """Refuse files that are not read, and options that would go unused."""
        formats = {path: self._format_of(path) for path in self.files}
        for path, kind in formats.items():
            if self.format is None and (advice := REFUSED.get(_inner_suffix(path))):
                raise UserError(f"{path}: {_inner_suffix(path)} is not read; {advice}")
            if kind == "text" and column is not None:
                raise UserError(
                    f"data.sources.files.column = '{column}': {path} is read as text, which has "
                    "no columns; leave column out, or state its format, such as format: jsonl"
                )
        if self.separator is not None and "text" not in formats.values():
            path, kind = next(iter(formats.items()))
            raise UserError(
                f"data.sources.files.separator = {self.separator!r}: {path} is read as {kind}, "
                "whose rows are the documents; leave separator out, or state format: text"
            )

    def _documents_of(self, path: Path) -> Iterator[str | None]:
        number = 1
        try:
            for text in self._texts_of(path):
                yield text
                number += 1
        except MemoryError:
            raise UserError(
                f"{path}: document {number} does not fit in memory; divide it"
            ) from None

    def _texts_of(self, path: Path) -> Iterator[str | None]:
        kind = self._format_of(path)
        if kind == "text":
            return documents_of_text(path, self.separator, stated=self.format is not None)
        return READERS[kind](path, self.column)


def stamp(path: Path) -> list[object]:
    """Tell files apart by name, size, time of change, and the bytes at both their ends."""
    found = path.stat()
    with path.open("rb") as file:
        ends = file.read(SAMPLED_BYTES)
        file.seek(max(found.st_size - SAMPLED_BYTES, 0))
        ends += file.read(SAMPLED_BYTES)
    return [path.name, found.st_size, found.st_mtime_ns, hashlib.sha256(ends).hexdigest()]


def _inner_suffix(path: Path) -> str:
    """Return the suffix that tells what a file holds once it is decompressed, or ""."""
    name = path.with_suffix("") if packing(path) else path
    return name.suffix.lower()


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
