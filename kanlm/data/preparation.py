"""Tokenising a source once, so that every later run reads shards.

A preparation that is killed goes on after its last finished shard: until it is complete,
it lives in a `.partial` folder whose `progress.json` knows the shards written so far and
where in the source they end. The finished folder appears by a rename. Of two processes
that prepare the same thing, the second waits for the first and reuses its work.
"""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import TypeAdapter
from transformers import PreTrainedTokenizerFast

from kanlm.config import DataSettings
from kanlm.data.shards import (
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    Shard,
    ShardedSource,
    count_splits,
    disk_errors,
    manifest_to_json,
    write_json,
    write_shard,
)
from kanlm.data.sources.base import Cursor, Source, hash_json, is_blank
from kanlm.data.splits import SPLITS, blocks, split_contiguously, split_of_digest, text_digest
from kanlm.data.tokenizer import decode, encode, end_of_document, tokenizer_hash
from kanlm.errors import UserError

#: Tokens after which a shard of every split is written, and progress with it.
SHARD_TOKENS = 2**24
#: Documents, and characters, that are tokenised at once.
BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 2**22

#: Documents, and characters of each, on which a tokenizer's losses are looked for.
SPELLING_DOCUMENTS = 32
SPELLING_CHARACTERS = 2**14

PROGRESS = "progress.json"


@dataclass(frozen=True)
class Piece:
    """A document, or a block of the only one, and the reading's state after it."""

    split: str
    text: str
    cursor: Cursor
    content_hash: str
    empty: int


@dataclass
class Progress:
    """What a killed preparation leaves behind."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    single_document: bool
    cursor: Cursor | None = None
    #: Chained sha256 of all text read so far.
    content_hash: str = hashlib.sha256().hexdigest()
    #: Documents left out so far.
    empty: int = 0
    #: Shards written so far of the split that has most.
    rounds: int = 0
    shards: list[Shard] = field(default_factory=list)


def prepare(
    source: Source,
    tokenizer: PreTrainedTokenizerFast,
    data: DataSettings,
    *,
    shard_tokens: int = SHARD_TOKENS,
    report: Callable[[str], None] = lambda line: None,
) -> ShardedSource:
    """Return the source's shards, tokenising it if that has not been done.

    Args:
        source: what to read.
        tokenizer: its end-of-document token follows every document, except where the
            source is a single one.
        data: gives the split fractions and the cache folder.
        shard_tokens: size of a shard; the last document may exceed it.
        report: takes lines on what is being done.

    Raises:
        UserError: the source has no text or bad text, the disk is full, or the folder of
            shards does not match its manifest.
    """
    expected = {
        "source_hash": source.fingerprint(),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "validation_fraction": data.validation_fraction,
        "test_fraction": data.test_fraction,
    }
    key = hash_json([FORMAT_VERSION, expected])[:16]
    folder = Path(data.cache_dir) / f"{source.label}-{key}"
    if not folder.exists():
        with disk_errors(folder.parent), _lock(folder):
            # Another process may have finished it while this one waited.
            if not folder.exists():
                _prepare_folder(source, tokenizer, expected, folder, shard_tokens, report)
    return ShardedSource(folder, expected)


def training_documents(source: Source, data: DataSettings) -> Iterator[str]:
    """Yield the text that falls into training, before near-duplicates are dropped."""
    progress = Progress(single_document=source.single_document)
    pieces = _Reading(source, progress, data.validation_fraction, data.test_fraction)
    return (piece.text for piece in pieces if piece.split == "train")


def _prepare_folder(
    source: Source,
    tokenizer: PreTrainedTokenizerFast,
    expected: dict[str, Any],
    folder: Path,
    shard_tokens: int,
    report: Callable[[str], None],
) -> None:
    """Write all shards into `FOLDER.partial` and rename it to `folder`."""
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(exist_ok=True)
    for leftover in partial.glob(".*"):
        leftover.unlink()
    progress = _read_progress(partial)
    if progress is None:
        progress = Progress(single_document=source.single_document)
        report(f"preparing {source.describe()} in {folder}")
    else:
        tokens = sum(shard.tokens for shard in progress.shards)
        report(f"preparing {source.describe()} from where it stopped, after {tokens:,} tokens")
    dtype = "uint16" if len(tokenizer) <= 2**16 else "uint32"
    fractions = expected["validation_fraction"], expected["test_fraction"]
    reading = _Reading(source, progress, *fractions)
    buffer = _Buffer(partial, tokenizer, dtype, progress)
    for batch in _batches(reading):
        buffer.add(batch)
        if buffer.tokens >= shard_tokens:
            buffer.flush()
            report(f"{sum(shard.tokens for shard in progress.shards):,} tokens so far")
    buffer.flush()
    if not progress.shards:
        raise UserError(f"source {source.label} holds no text: {source.describe()}")
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source=source.describe(),
        content_hash=progress.content_hash,
        notes=[*source.notes(), *_notes_on_spelling(source, tokenizer)],
        end_of_document=end_of_document(tokenizer),
        dtype=dtype,
        single_document=progress.single_document,
        empty_documents=reading.empty,
        counts=count_splits(progress.shards),
        shards=progress.shards,
        **expected,
    )
    write_json(partial / MANIFEST, manifest_to_json(manifest))
    (partial / PROGRESS).unlink(missing_ok=True)
    partial.rename(folder)
    for note in manifest.notes:
        report(f"{source.label}: {note}")
    report(f"{source.label}: sha256 of the text {manifest.content_hash}")


def _notes_on_spelling(source: Source, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Say so if tokens lose part of the text, as some pretrained tokenizers' do."""
    texts = [text[:SPELLING_CHARACTERS] for text in islice(source.documents(), SPELLING_DOCUMENTS)]
    pairs = zip(texts, encode(tokenizer, texts), strict=True)
    lossy = sum(decode(tokenizer, tokens) != text for text, tokens in pairs)
    if not lossy:
        return []
    return [
        f"the tokenizer does not spell {lossy} of the first {len(texts)} documents exactly: "
        "bits per byte leave out what it loses"
    ]


class _Buffer:
    """Tokenised documents that wait for the next shard."""

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerFast, dtype: str, progress: Progress
    ) -> None:
        self.folder, self.tokenizer, self.dtype, self.progress = folder, tokenizer, dtype, progress
        self._clear()

    def add(self, pieces: list[Piece]) -> None:
        """Tokenise a batch. Sizes count the end-of-document token as a token and no byte."""
        end = np.array([] if self.progress.single_document else [end_of_document(self.tokenizer)])
        encoded = encode(self.tokenizer, [piece.text for piece in pieces])
        for piece, tokens in zip(pieces, encoded, strict=True):
            whole = np.concatenate([tokens, end]).astype(self.dtype)
            self.documents[piece.split].append(whole)
            size = (len(whole), len(piece.text.split()), len(piece.text.encode()))
            self.sizes[piece.split].append(size)
            self.tokens += len(whole)
        self.last = pieces[-1]

    def flush(self) -> None:
        """Write a shard of each split that has documents, then the progress made."""
        if self.last is None:
            return
        progress = self.progress
        for split in SPLITS:
            documents, sizes = self.documents[split], self.sizes[split]
            if documents:
                shard = write_shard(
                    self.folder, split, progress.rounds, documents, sizes, self.dtype
                )
                progress.shards.append(shard)
        progress.rounds += 1
        progress.cursor = self.last.cursor
        progress.content_hash = self.last.content_hash
        progress.empty = self.last.empty
        write_json(self.folder / PROGRESS, asdict(progress))
        self._clear()

    def _clear(self) -> None:
        self.documents: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        self.sizes: dict[str, list[tuple[int, int, int]]] = {split: [] for split in SPLITS}
        self.tokens = 0
        self.last: Piece | None = None


class _Reading:
    """Reads on after `progress`, placing every document, or block of the only one, in a split."""

    def __init__(
        self, source: Source, progress: Progress, validation_fraction: float, test_fraction: float
    ) -> None:
        self.source = source
        self.fractions = validation_fraction, test_fraction
        self.single_document = progress.single_document
        self.cursor = progress.cursor
        self.content_hash = progress.content_hash
        self.empty = progress.empty

    def __iter__(self) -> Iterator[Piece]:
        return self._blocks() if self.single_document else self._documents()

    def _documents(self) -> Iterator[Piece]:
        for text, cursor in self.source.read(self.cursor):
            if is_blank(text):
                self.empty += 1
                continue
            digest = text_digest(text)
            self.content_hash = hashlib.sha256(self.content_hash.encode() + digest).hexdigest()
            split = split_of_digest(digest, *self.fractions)
            yield Piece(split, text, cursor, self.content_hash, self.empty)

    def _blocks(self) -> Iterator[Piece]:
        text = next(self.source.documents())
        self.content_hash = text_digest(text).hex()
        done = self.cursor["blocks"] if self.cursor else 0
        number = 0
        for split, part in split_contiguously(text, *self.fractions).items():
            for block in blocks(part):
                number += 1
                if number > done:
                    yield Piece(split, block, {"blocks": number}, self.content_hash, 0)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Group pieces so that each group is worth tokenising in parallel and fits in memory."""
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _read_progress(partial: Path) -> Progress | None:
    path = partial / PROGRESS
    if not path.exists():
        return None
    try:
        # JSON mode is strict about types.
        return TypeAdapter(Progress).validate_json(path.read_bytes(), strict=True)
    except (ValueError, OSError):
        raise UserError(f"{path}: damaged; delete {partial} to prepare it anew") from None


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold a lock that the operating system releases if this process dies."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f".{folder.name}.lock"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
