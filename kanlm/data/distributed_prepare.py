"""Parts of a source tokenised apart, and joined to the very shards that `prepare` writes.

Where a shard ends depends on all documents before it, and so does the hash of the text. So a
part is a plain record of its documents in their order, in the folder `SOURCE-KEY.parts-of-N`:
`NNNNN.tokens` (their tokens end to end), `NNNNN.documents` (a row of `DOCUMENT` for each) and,
written last, `NNNNN.json`, which says how much there is and its checksums. Once all N are
there, one process reads them in order and writes the shards; if killed, it resumes after its last
finished shard.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from kanlm.atomic_io import write_atomically
from kanlm.checksums import file_sha256
from kanlm.config import parse_json
from kanlm.data.batch_encode import (
    Document,
    LeftOut,
    ahead,
    assign_split,
    by_split,
    document_batches,
    encode_documents,
    split_numbers,
)
from kanlm.data.preparation import (
    SHARD_TOKENS,
    PreparationProgress,
    Target,
    Tokenised,
    chained_hash,
    prepare_by,
)
from kanlm.data.shards import (
    ShardedSource,
    disk_errors,
    write_json,
)
from kanlm.data.sources.base import is_blank
from kanlm.data.tokenizer import Encoder, end_of_document
from kanlm.errors import UserError

#: A document of a part. `split` is its place in `SPLITS`; bytes and digest are of its text.
DOCUMENT = np.dtype(
    [
        ("split", "u1"),
        ("sizes", "i8", 3),
        ("characters", "i8"),
        ("digest", "u1", hashlib.sha256().digest_size),
    ]
)


@dataclass
class Part:
    """How much a part holds."""

    documents: int = 0
    tokens: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)
    #: File name → hex sha256.
    sha256: dict[str, str] = field(default_factory=dict)


def write_part(target: Target, index: int, count: int) -> Part:
    """Tokenise one of so many parts of a source, unless that has been done.

    Raises:
        UserError: the source is a single document, which is not divided, or has bad text, or
            the disk is full.
    """
    if target.source.single_document:
        raise UserError(
            f"source {target.source.label} is a single document, which is not tokenised in "
            "parts; prepare it by `kanlm data prepare`"
        )
    folder = _parts_folder(target, count)
    names = _Names(folder, index)
    with disk_errors(folder.parent):
        folder.mkdir(parents=True, exist_ok=True)
        if names.summary.exists():
            return _read_part(names)
        part = Part()

        def write(tokens: IO[bytes]) -> None:
            write_atomically(names.documents, partial(_write, target, index, count, part, tokens))

        write_atomically(names.tokens, write)
        part.sha256 = names.checksums()
        write_json(names.summary, asdict(part))
    return part


def join_parts(
    target: Target,
    *,
    shard_tokens: int = SHARD_TOKENS,
    report: Callable[[str], None] = lambda line: None,
) -> ShardedSource:
    """Return the source's shards, made of its parts if they are not there; these are deleted.

    Args:
        target: what was tokenised in parts.
        shard_tokens: see `prepare`.
        report: takes lines on what is being done.

    Raises:
        UserError: parts are missing or damaged, or the source holds no text.
    """
    if target.folder.exists():
        sharded = ShardedSource(target.folder, target.expected)
    else:
        folder, count = _complete(target)
        parts = [_Names(folder, index) for index in range(count)]
        sharded = prepare_by(
            partial(_Joining, target, parts),
            target,
            folder / "shards",
            shard_tokens=shard_tokens,
            report=report,
        )
    for folder in _folders(target):
        shutil.rmtree(folder)
    return sharded


class _Names:
    """The files of a part."""

    def __init__(self, folder: Path, index: int) -> None:
        self.tokens = folder / f"{index:05d}.tokens"
        self.documents = folder / f"{index:05d}.documents"
        self.summary = folder / f"{index:05d}.json"

    def checksums(self) -> dict[str, str]:
        """Return file name → hex sha256 of what the summary sums up."""
        return {path.name: file_sha256(path) for path in (self.tokens, self.documents)}


class _Opened:
    """A part as it was written, mapped into memory.

    Attributes:
        documents: (documents,) of type `DOCUMENT`.
        tokens: (tokens,), end to end.
        starts: (documents + 1,) where each document begins, and the last ends.
    """

    def __init__(self, names: _Names, dtype: str) -> None:
        try:
            if names.checksums() != _read_part(names).sha256:
                raise _damaged(names)
        except OSError:
            raise _damaged(names) from None
        self.documents = _map(names.documents, DOCUMENT)
        self.tokens = _map(names.tokens, np.dtype(dtype))
        self.starts = np.concatenate([[0], np.cumsum(self.documents["sizes"][:, 0])])

    def piece(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens and rows of documents first…stop−1."""
        return self.tokens[self.starts[first] : self.starts[stop]], self.documents[first:stop]


class _Joining:
    """Batches of the documents of all parts, as `prepare` makes them, after `progress`."""

    def __init__(self, target: Target, parts: list[_Names], progress: PreparationProgress) -> None:
        self.dtype = target.dtype
        self.parts = parts
        self.content_hash = progress.content_hash
        self.start = progress.cursor or {"part": 0, "documents": 0}
        counts = [_read_part(names).left_out for names in parts]
        self.left_out = LeftOut(sum(c.empty for c in counts), sum(c.missing for c in counts))

    def __iter__(self) -> Iterator[Tokenised]:
        for rows in document_batches(self._rows(), lambda row: row.characters):
            runs = [list(run) for _, run in groupby(rows, lambda row: row.part)]
            pieces = [run[0].opened.piece(run[0].number, run[-1].number + 1) for run in runs]
            tokens, documents = map(np.concatenate, zip(*pieces, strict=True))
            for digest in documents["digest"]:
                self.content_hash = chained_hash(self.content_hash, digest.tobytes())
            yield Tokenised(
                by_split(tokens, documents["sizes"], documents["split"]),
                {"part": rows[-1].part, "documents": rows[-1].number + 1},
                self.content_hash,
                self.left_out,
            )

    def _rows(self) -> Iterator["_Row"]:
        first = self.start["documents"]
        for part in range(self.start["part"], len(self.parts)):
            opened = _Opened(self.parts[part], self.dtype)
            lengths = opened.documents["characters"][first:].tolist()
            for number, characters in enumerate(lengths, start=first):
                yield _Row(part, number, characters, opened)
            first = 0


class _Row(NamedTuple):
    """A document among those of all parts."""

    part: int
    number: int
    characters: int
    opened: _Opened


def _write(
    target: Target, index: int, count: int, part: Part, tokens_file: IO[bytes], file: IO[bytes]
) -> None:
    """Write the tokens and rows of a part's documents, and count them."""
    encoder, ending = Encoder(target.tokenizer), [end_of_document(target.tokenizer)]

    def documents() -> Iterator[Document]:
        for text in target.source.part(index, count):
            if text is None or is_blank(text):
                part.left_out = part.left_out.and_of(text)
            else:
                yield assign_split(text, *target.fractions)

    def encode(batch: list[Document]) -> tuple[np.ndarray, np.ndarray]:
        tokens, sizes = encode_documents(encoder, ending, batch)
        rows = np.empty(len(batch), DOCUMENT)
        rows["split"] = split_numbers(batch)
        rows["sizes"] = sizes
        rows["characters"] = [len(document.text) for document in batch]
        digests = b"".join(document.digest for document in batch)
        rows["digest"] = np.frombuffer(digests, np.uint8).reshape(len(batch), -1)
        return tokens.astype(target.dtype), rows

    groups = document_batches(documents(), lambda document: len(document.text))
    for tokens, rows in ahead(encode, groups):
        tokens_file.write(tokens.tobytes())
        file.write(rows.tobytes())
        part.tokens += len(tokens)
        part.documents += len(rows)


def _parts_folder(target: Target, count: int) -> Path:
    return target.folder.with_name(f"{target.folder.name}.parts-of-{count}")


def _folders(target: Target) -> list[Path]:
    """Find folders of parts of the source, by whatever number it was divided."""
    return sorted(target.folder.parent.glob(f"{target.folder.name}.parts-of-[0-9]*"))


def _complete(target: Target) -> tuple[Path, int]:
    """Return a folder that all parts are in, and how many these are."""
    problems = []
    for folder in _folders(target):
        count = int(folder.name.rpartition("-")[2])
        missing = [i for i in range(count) if not _Names(folder, i).summary.exists()]
        if not missing:
            return folder, count
        problems.append(f"{len(missing)} of {count} parts are missing in {folder}")
    found = "; ".join(problems) or f"there are no parts of it in {target.folder.parent}"
    raise UserError(
        f"source {target.source.label}: {found}; tokenise all parts first, of the same config"
    )


def _read_part(names: _Names) -> Part:
    try:
        return parse_json(Part, names.summary.read_bytes())
    except (ValueError, OSError):
        raise _damaged(names) from None


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    """Map a file of plain values; an empty one cannot be mapped."""
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def _damaged(names: _Names) -> UserError:
    return UserError(f"{names.summary}: damaged, or a file beside it; delete it to tokenise anew")
