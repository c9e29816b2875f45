"""Text files: UTF-8, in chunks, divided by a separator."""

import codecs
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from kanlm.data.sources.packing import CHUNK_BYTES, opened, packing
from kanlm.errors import UserError

#: Beginnings of files that hold rows or other files → what they are.
_BEGINNINGS = {
    b"PAR1": "parquet: state format: parquet",
    b"\x1f\x8b": "packed by gzip: let its name end in .gz",
    b"BZh": "packed by bzip2: let its name end in .bz2",
    b"\xfd7zXZ\0": "packed by xz: let its name end in .xz",
    b"\x28\xb5\x2f\xfd": "packed by zstd: let its name end in .zst",
    b"PK\x03\x04": "an archive: unpack it",
    b"ARROW1": "Arrow: convert it to parquet",
    b"\xff\xfe": "UTF-16: convert it to UTF-8",
    b"\xfe\xff": "UTF-16: convert it to UTF-8",
}


def documents_of_text(path: Path, separator: str | None, *, stated: bool) -> Iterator[str]:
    """Yield the documents of a text file.

    Args:
        path: of the file.
        separator: what stands between documents; None makes the whole one.
        stated: whether the user says that it is text, and not its name alone.

    Raises:
        UserError: see `chunks_of_text`.
    """
    return separated(chunks_of_text(path, stated=stated), separator)


def chunks_of_text(path: Path, *, stated: bool) -> Iterator[str]:
    r"""Yield a file's text in chunks, with the line ends \r\n and \r as \n, as `open` does.

    Raises:
        UserError: it cannot be read, is not UTF-8, holds NUL bytes, or, unless `stated`, begins
            like a file of another kind.
    """
    line_ends = io.IncrementalNewlineDecoder(None, translate=True)
    for text in decoded(path, None if stated else _refuse_disguised):
        yield line_ends.decode(text)
    yield line_ends.decode("", final=True)


def has_carriage_returns(path: Path) -> bool:
    r"""Whether a line near the beginning of a file ends in \r\n or \r."""
    return "\r" in next(decoded(path))


def decoded(path: Path, check: Callable[[Path, bytes], None] | None = None) -> Iterator[str]:
    """Yield a file's UTF-8 text in chunks as it is; a byte-order mark is no part of it.

    Args:
        path: of the file.
        check: is given the path and the first bytes.

    Raises:
        UserError: it cannot be read, is not UTF-8, or holds NUL bytes.
    """
    with opened(path) as file:
        offset, pending, final = 0, b"", False
        while not final:
            chunk = file.read(CHUNK_BYTES)
            final = not chunk
            data = pending + chunk
            if check and not offset:
                check(path, data)
            try:
                text, used = codecs.utf_8_decode(data, "strict", final)
            except UnicodeDecodeError as error:
                place = offset + error.start
                raise UserError(_undecodable(path, place, data[error.start])) from None
            if "\0" in text:
                place = offset + data.index(b"\0")
                raise UserError(_undecodable(path, place, 0, "no text, or UTF-16"))
            yield text.removeprefix("\ufeff") if offset == 0 else text
            pending = data[used:]
            offset += used


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


def _refuse_disguised(path: Path, data: bytes) -> None:
    """Refuse what would be trained on as prose, and holds something else."""
    for beginning, kind in _BEGINNINGS.items():
        if data.startswith(beginning):
            raise UserError(f"{path}: by its name text, but it begins like {kind}")
    line = data.lstrip().partition(b"\n")[0]
    if line.startswith(b"{"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return
        if isinstance(row, dict) and row:
            raise UserError(
                f"{path}: by its name text, but it begins with a JSON object; state "
                "format: jsonl, or format: text to train on it as it is"
            )


def _undecodable(path: Path, offset: int, byte: int, what: str = "not UTF-8") -> str:
    inside = " once decompressed" if packing(path) else ""
    return f"{path}: {what}: byte {offset}{inside} is 0x{byte:02x}; convert it, or leave it out"
