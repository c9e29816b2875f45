"""The files a tokenised source is kept in.

A folder holds, for each shard, `SPLIT-NNNNN.tokens.npy` (the tokens of whole documents,
one after another, uint16 or uint32) and `SPLIT-NNNNN.documents.npy` ((documents, 3) int64:
tokens, words and bytes of each document), and a `manifest.json` that says what they were
made of and what their checksums are. Training reads these alone, memory-mapped.
"""

import errno
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kanlm.atomic_io import cannot_write, disk_is_full, write_atomically
from kanlm.checksums import file_sha256
from kanlm.config import parse_json
from kanlm.data.splits import SPLITS
from kanlm.errors import UserError

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
#: Of tokens on disk.
DTYPES = ("uint16", "uint32")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One pair of files: whole documents of one split.

    Raises:
        ValueError: a name that is not one of ours, which could lead out of the folder.
    """

    split: str
    name: str
    tokens: int
    documents: int
    words: int
    bytes: int
    #: File name → hex sha256.
    sha256: dict[str, str]

    def __post_init__(self) -> None:
        if self.split not in SPLITS or not re.fullmatch(rf"{self.split}-\d{{5,}}", self.name):
            raise ValueError(f"{self.name!r} is no name of a shard of {self.split!r}")
        if self.sha256.keys() != {tokens_file(self.name), documents_file(self.name)}:
            raise ValueError(f"the checksums of {self.name} are not those of its files")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of shards was made of."""

    format_version: int
    #: Of the source: what decides reuse, what it is, and the hash of the text read.
    source_hash: str
    source: str
    content_hash: str
    notes: list[str]
    tokenizer_hash: str
    end_of_document: int
    dtype: str
    validation_fraction: float
    test_fraction: float
    #: One document, split contiguously and cut into blocks that stand for documents.
    single_document: bool
    #: Documents left out for holding nothing but white space.
    empty_documents: int
    #: Rows left out for having no text: null, or whatever their format has for it.
    missing_documents: int
    #: Split → tokens, documents, words, bytes.
    counts: dict[str, dict[str, int]]
    shards: list[Shard]


class ShardedSource:
    """A prepared source, opened for reading.

    Args:
        folder: where `manifest.json` lies.
        expected: fields of the manifest that must have these values.

    Raises:
        UserError: the folder is damaged or was made of something else; the line names the
            file and says to delete the folder.
    """

    def __init__(self, folder: Path, expected: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder)
        for key, value in expected.items():
            found = getattr(self.manifest, key)
            if found != value:
                where = folder / MANIFEST
                raise UserError(f"{where}: {key} is {found}, expected {value}; {_delete(folder)}")
        digests = [item for shard in self.manifest.shards for item in shard.sha256.items()]
        self._digests = {folder / name: digest for name, digest in digests}
        self._stamps = {path: _stamp(path) for path in self._digests}
        _verify(self._digests, folder)

    def check_unchanged(self) -> None:
        """Compare with its checksum what has another size or time of change than when opened.

        Raises:
            UserError: a file is gone or holds something else.
        """
        changed = {
            path: self._digests[path]
            for path, stamp in self._stamps.items()
            if _stamp(path) != stamp
        }
        _verify(changed, self.folder)
        self._stamps.update({path: _stamp(path) for path in changed})

    @property
    def ending(self) -> int:
        """Tokens after the text of each document: its end marker, or none."""
        return 0 if self.manifest.single_document else 1

    def shards(self, split: str) -> list[Shard]:
        """Return the shards of a split in the order of their documents."""
        return [shard for shard in self.manifest.shards if shard.split == split]

    def tokens(self, shard: Shard) -> np.ndarray:
        """Map the shard's tokens, (tokens,) of the manifest's dtype."""
        shape = (shard.tokens,)
        return self._array(tokens_file(shard.name), shape, self.manifest.dtype, mmap_mode="r")

    def documents(self, shard: Shard) -> np.ndarray:
        """Return tokens, words and bytes of each document, (documents, 3) int64."""
        rows = self._array(documents_file(shard.name), (shard.documents, 3), "int64")
        if rows.min(initial=0) < 0 or rows.sum(axis=0).tolist() != [
            shard.tokens,
            shard.words,
            shard.bytes,
        ]:
            raise self._other(documents_file(shard.name))
        return rows

    def _array(self, name: str, shape: tuple[int, ...], dtype: str, **options: Any) -> np.ndarray:
        try:
            array = np.load(self.folder / name, allow_pickle=False, **options)
        except (ValueError, OSError, EOFError):
            raise self._other(name) from None
        if array.shape != shape or array.dtype != dtype:
            raise self._other(name)
        return array

    def _other(self, name: str) -> UserError:
        return UserError(
            f"{self.folder / name}: not what the manifest says; {_delete(self.folder)}"
        )


def tokens_file(name: str) -> str:
    """Return the file that holds a shard's tokens."""
    return f"{name}.tokens.npy"


def documents_file(name: str) -> str:
    """Return the file that holds the sizes of a shard's documents."""
    return f"{name}.documents.npy"


def write_shard(
    folder: Path,
    split: str,
    number: int,
    tokens: Sequence[np.ndarray],
    sizes: Sequence[np.ndarray],
) -> Shard:
    """Write one shard's two files, each whole or not at all.

    Args:
        folder: where to.
        split: split that all documents belong to.
        number: distinguishes the shards of a split, in order.
        tokens: of the documents, end to end, in pieces; their type is that on the disk.
        sizes: (documents, 3) tokens, words and bytes of each document, in pieces.
    """
    name = f"{split}-{number:05d}"
    rows = np.concatenate(sizes)
    arrays = {tokens_file(name): np.concatenate(tokens), documents_file(name): rows}
    for file, array in arrays.items():
        write_atomically(folder / file, functools.partial(np.save, arr=array, allow_pickle=False))
    n_tokens, words, size = rows.sum(axis=0).tolist()
    return Shard(
        split=split,
        name=name,
        tokens=n_tokens,
        documents=len(rows),
        words=words,
        bytes=size,
        sha256={file: file_sha256(folder / file) for file in arrays},
    )


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Around what reads sources and writes to the cache folder: errors of writing in one line.

    Raises:
        UserError: the folder is full or cannot be written. Other errors are left as they are.
    """
    try:
        yield
    except OSError as error:
        denied = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
        if not (disk_is_full(error) or error.errno in denied):
            raise
        where = f"data.cache_dir = {folder}"
        raise cannot_write(where, error, "what is finished is kept") from None


def count_splits(shards: Sequence[Shard]) -> dict[str, dict[str, int]]:
    """Sum tokens, documents, words and bytes over the shards of each split."""
    names = ("tokens", "documents", "words", "bytes")
    return {
        split: {name: sum(getattr(s, name) for s in shards if s.split == split) for name in names}
        for split in SPLITS
    }


def manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    """Return the content of `manifest.json`."""
    return asdict(manifest)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        tree = json.loads(path.read_bytes())
        version = tree.get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path}: format_version is {version}, expected {FORMAT_VERSION}; {_delete(folder)}"
            )
        manifest = parse_json(Manifest, json.dumps(tree))
        if manifest.dtype not in DTYPES or manifest.counts != count_splits(manifest.shards):
            raise ValueError
        return manifest
    except FileNotFoundError:
        raise UserError(f"{path}: missing; {_delete(folder)}") from None
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{path}: not a manifest of shards; {_delete(folder)}") from None


def _verify(digests: Mapping[Path, str], folder: Path) -> None:
    """Compare files with their checksums, on several threads."""
    with ThreadPoolExecutor() as pool:
        problems = pool.map(lambda item: _problem(*item), digests.items())
        for path, problem in zip(digests, problems, strict=True):
            if problem:
                raise UserError(f"{path}: {problem}; {_delete(folder)}")


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return size and time of change of a file, None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _problem(path: Path, digest: str) -> str | None:
    try:
        found = file_sha256(path)
    except FileNotFoundError:
        return "missing though the manifest lists it"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if found == digest else "does not match the manifest's checksum"


def _delete(folder: Path) -> str:
    return f"delete the folder {folder} to prepare it anew"
