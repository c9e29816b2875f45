"""Compressed files read as their own tools read them: every stream in the file, or an error.

What follows the last whole stream and begins no other is refused. Python's own readers of bzip2
and xz take it for the end of the file, and with it every later stream whose header is damaged.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from kanlm.errors import UserError

CHUNK_BYTES = 2**20


class _Streams(io.RawIOBase):
    """The bytes in a file of compressed streams, one after another.

    Args:
        file: the packed bytes.
        start: makes a decompressor for the next stream.
        padding: whether NULs, in fours, may follow a stream, as xz allows.
    """

    def __init__(self, file: IO[bytes], start: Callable[[], Any], *, padding: bool) -> None:
        self._file, self._start, self._padding = file, start, padding
        self._stream, self._packed = start(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._stream.eof or self._begin_next():
            packed = b""
            if self._stream.needs_input:
                packed, self._packed = self._packed or self._file.read(CHUNK_BYTES), b""
                if not packed:
                    raise EOFError("it is cut off")
            found = self._stream.decompress(packed, len(buffer))
            if found:
                buffer[: len(found)] = found
                return len(found)
        return 0

    def _begin_next(self) -> bool:
        """Go to the stream after the one that has ended; False at the end of the file."""
        packed = self._stream.unused_data or self._file.read(CHUNK_BYTES)
        nulls = 0
        while self._padding and packed and not packed.strip(b"\0"):
            nulls += len(packed)
            packed = self._file.read(CHUNK_BYTES)
        if self._padding:
            whole = len(packed)
            packed = packed.lstrip(b"\0")
            nulls += whole - len(packed)
        if nulls % 4:
            raise OSError(f"{nulls} NULs after a stream, expected a multiple of 4")
        if packed:
            self._stream, self._packed = self._start(), packed
        return bool(packed)


def _open_bzip2(path: Path) -> Any:
    return io.BufferedReader(_Streams(path.open("rb"), bz2.BZ2Decompressor, padding=False))


def _open_xz(path: Path) -> Any:
    def start() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ)

    return io.BufferedReader(_Streams(path.open("rb"), start, padding=True))


def _open_zstandard(path: Path) -> Any:
    import pyarrow

    # The zstandard package takes a truncated file for a whole one; this does not.
    stream: Any = pyarrow.input_stream(path, compression="zstd")
    return io.BufferedReader(stream)


#: Suffix → what opens such a file for reading the bytes packed in it.
OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".gzip": gzip.open,
    ".bz2": _open_bzip2,
    ".xz": _open_xz,
    ".zst": _open_zstandard,
    ".zstd": _open_zstandard,
}


def packing(path: Path) -> str:
    """Return the suffix that says how a file is compressed, or ""."""
    suffix = path.suffix.lower()
    return suffix if suffix in OPENERS else ""


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, unpacked.

    Raises:
        UserError: it cannot be read, now or later; the line names the file.
    """
    try:
        if packing(path) and not path.stat().st_size:
            raise EOFError("it is empty, not even an empty file compressed")
        with OPENERS[packing(path)](path) if packing(path) else path.open("rb") as file:
            yield file
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{path}: cannot be read: {reason}") from None
