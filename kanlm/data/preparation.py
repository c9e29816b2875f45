"""Tokenising a source once, so that every later run reads shards.

A preparation that is killed resumes after its last finished shard: until it is complete,
it lives in a `.partial` folder whose `progress.json` knows the shards written so far and
where in the source they end. The finished folder appears by a rename. Of two processes
that prepare the same thing, the second waits for the first and reuses its work.

Memory is bounded whatever the size of the source. Batches of documents are tokenised on all
cores by threads, while this one reads the next and writes what is done. A document is held
whole, but for the text of a source that is nothing but one file of text: that streams past.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock
from transformers import PreTrainedTokenizerFast

from kanlm.config import DataSettings, parse_json
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
from kanlm.data.splits import SPLITS, Text, blocks, contiguous_lengths
from kanlm.data.tokenizer import Encoder, decode, end_of_document, tokenizer_hash, vocabulary_size
from kanlm.errors import UserError
from kanlm.faults import fault_point

#: Tokens after which a shard of every split is written, and progress with it.
SHARD_TOKENS = 2**24
#: Documents, and characters of each, on which a tokenizer's losses are looked for.
SPELLING_DOCUMENTS = 32
SPELLING_CHARACTERS = 2**12

PROGRESS = "progress.json"
#: Seconds between lines on how far a preparation is.
TELL_EVERY = 10.0


@dataclass(frozen=True)
class Read:
    """A document, and the reading's state after it."""

    document: Document
    cursor: Cursor
    content_hash: str
    left_out: LeftOut


@dataclass(frozen=True)
class Tokenised:
    """A batch of documents, and the reading's state after it."""

    #: Split → tokens of its documents, end to end, and (documents, 3) tokens, words and bytes.
    splits: dict[str, tuple[np.ndarray, np.ndarray]]
    cursor: Cursor
    content_hash: str
    left_out: LeftOut


class Reading(Protocol):
    """All batches of tokens of a source after some progress."""

    def __iter__(self) -> Iterator[Tokenised]: ...

    @property
    def left_out(self) -> LeftOut:
        """Return what has been left out so far."""
        ...


@dataclass
class PreparationProgress:
    """What a killed preparation leaves behind."""

    single_document: bool
    cursor: Cursor | None = None
    #: Chained sha256 of all text read so far.
    content_hash: str = hashlib.sha256().hexdigest()
    left_out: LeftOut = field(default_factory=LeftOut)
    #: Shards written so far of the split that has most.
    rounds: int = 0
    shards: list[Shard] = field(default_factory=list)


@dataclass(frozen=True)
class Target:
    """What is prepared, and where its shards lie when that is done."""

    source: Source
    tokenizer: PreTrainedTokenizerFast
    #: Fields of the manifest that decide whether shards may be reused.
    expected: dict[str, Any]
    folder: Path

    @classmethod
    def of(cls, source: Source, tokenizer: PreTrainedTokenizerFast, data: DataSettings) -> "Target":
        """Name the folder by what decides on its content."""
        expected = {
            "source_hash": source.fingerprint(),
            "tokenizer_hash": tokenizer_hash(tokenizer),
            "validation_fraction": data.validation_fraction,
            "test_fraction": data.test_fraction,
        }
        key = hash_json([FORMAT_VERSION, expected])[:16]
        folder = Path(data.cache_dir) / f"{source.label}-{key}"
        return cls(source, tokenizer, expected, folder)

    @property
    def fractions(self) -> tuple[float, float]:
        """Shares of the text in validation and test."""
        return self.expected["validation_fraction"], self.expected["test_fraction"]

    @property
    def dtype(self) -> str:
        """Of tokens on the disk."""
        return "uint16" if vocabulary_size(self.tokenizer) <= 2**16 else "uint32"


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
    target = Target.of(source, tokenizer, data)
    return prepare_target(target, shard_tokens=shard_tokens, report=report)


def prepare_target(
    target: Target,
    *,
    shard_tokens: int = SHARD_TOKENS,
    report: Callable[[str], None] = lambda line: None,
) -> ShardedSource:
    """Prepare one target; see `prepare`."""
    unfinished = target.folder.with_name(target.folder.name + ".partial")
    read = partial(_Tokenising, target)
    return prepare_by(read, target, unfinished, shard_tokens=shard_tokens, report=report)


def prepare_by(
    read: Callable[[PreparationProgress], Reading],
    target: Target,
    unfinished: Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
    report: Callable[[str], None] = lambda line: None,
) -> ShardedSource:
    """Return the target's shards, made of what `read` reads if they are not there.

    Args:
        read: gives all batches of tokens after some progress.
        target: what is prepared, and where.
        unfinished: folder to write into, resuming from what is in it.
        shard_tokens: size of a shard; the last batch may exceed it.
        report: takes lines on what is being done.

    Raises:
        UserError: as `prepare`.
    """
    folder = target.folder
    if not folder.exists():
        with disk_errors(folder.parent), _lock(folder):
            # Another process may have finished it while this one waited.
            if not folder.exists():
                _prepare_folder(read, target, unfinished, shard_tokens, report)
    return ShardedSource(folder, target.expected)


def training_documents(source: Source, data: DataSettings) -> Iterator[str]:
    """Yield the text that falls into training, before near-duplicates are dropped."""
    progress = PreparationProgress(single_document=source.single_document)
    reading = _Reading(source, progress, data.validation_fraction, data.test_fraction)
    return (read.document.text for read in reading if read.document.split == "train")


def chained_hash(content_hash: str, digest: bytes) -> str:
    """Return the hash of all documents up to one with this digest."""
    return hashlib.sha256(content_hash.encode() + digest).hexdigest()


def _prepare_folder(
    read: Callable[[PreparationProgress], Reading],
    target: Target,
    unfinished: Path,
    shard_tokens: int,
    report: Callable[[str], None],
) -> None:
    """Write all shards into `unfinished` and rename it to the target's folder."""
    source, tokenizer, folder = target.source, target.tokenizer, target.folder
    unfinished.mkdir(exist_ok=True)
    for leftover in unfinished.glob(".*"):
        leftover.unlink()
    try:
        progress, reading = _write_shards(read, target, unfinished, shard_tokens, report)
    except BaseException:
        # Nothing in it to resume from.
        if not (unfinished / PROGRESS).exists() and not any(unfinished.iterdir()):
            unfinished.rmdir()
        raise
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source=source.describe(),
        content_hash=progress.content_hash,
        notes=[*source.notes(), *_notes_on_spelling(source, tokenizer)],
        end_of_document=end_of_document(tokenizer),
        dtype=target.dtype,
        single_document=progress.single_document,
        empty_documents=reading.left_out.empty,
        missing_documents=reading.left_out.missing,
        counts=count_splits(progress.shards),
        shards=progress.shards,
        **target.expected,
    )
    write_json(unfinished / MANIFEST, manifest_to_json(manifest))
    (unfinished / PROGRESS).unlink(missing_ok=True)
    unfinished.rename(folder)
    for note in (*reading.left_out.counts(), *manifest.notes):
        report(f"{source.label}: {note}")
    report(f"{source.label}: sha256 of the text {manifest.content_hash}")


def _write_shards(
    read: Callable[[PreparationProgress], Reading],
    target: Target,
    unfinished: Path,
    shard_tokens: int,
    report: Callable[[str], None],
) -> tuple[PreparationProgress, Reading]:
    """Write all shards, or those that are missing, and the progress made."""
    source, folder = target.source, target.folder
    progress = _read_progress(unfinished)
    if progress is None:
        progress = PreparationProgress(single_document=source.single_document)
        report(f"preparing {source.describe()} in {folder}")
    else:
        tokens = sum(shard.tokens for shard in progress.shards)
        report(f"preparing {source.describe()} from where it stopped, after {tokens:,} tokens")
    reading = read(progress)
    buffer = _Buffer(unfinished, progress)
    told = time.monotonic()
    for batch in reading:
        buffer.add(batch)
        if time.monotonic() - told > TELL_EVERY:
            tokens = sum(shard.tokens for shard in progress.shards) + buffer.tokens
            report(f"{source.label}: {tokens:,} tokens read")
            told = time.monotonic()
        if buffer.tokens >= shard_tokens:
            buffer.flush()
            report(f"{sum(shard.tokens for shard in progress.shards):,} tokens so far")
    buffer.flush()
    if not progress.shards:
        found = " and ".join(reading.left_out.counts()) or "it is empty"
        raise UserError(f"source {source.label} holds no text: {source.describe()}: {found}")
    return progress, reading


def _notes_on_spelling(source: Source, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Say so if tokens lose part of the text, as some pretrained tokenizers' do."""
    encoder = Encoder(tokenizer)
    beginnings = source.chunks() if source.single_document else source.documents()
    texts = [text[:SPELLING_CHARACTERS] for text in islice(beginnings, SPELLING_DOCUMENTS)]
    pairs = zip(texts, encoder.encode(texts), strict=True)
    lossy = sum(decode(tokenizer, tokens) != text for text, tokens in pairs)
    if not lossy:
        return []
    return [
        f"the tokenizer does not spell {lossy} of the first {len(texts)} documents exactly: "
        "bits per byte leave out what it loses"
    ]


class _Buffer:
    """Tokenised documents that wait for the next shard."""

    def __init__(self, folder: Path, progress: PreparationProgress) -> None:
        self.folder, self.progress = folder, progress
        self._clear()

    def add(self, batch: Tokenised) -> None:
        for split, (tokens, sizes) in batch.splits.items():
            if len(sizes):
                self.waiting[split].append((tokens, sizes))
                self.tokens += len(tokens)
        self.last = batch

    def flush(self) -> None:
        """Write a shard of each split that has documents, then the progress made."""
        if self.last is None:
            return
        progress = self.progress
        for split, waiting in self.waiting.items():
            if waiting:
                tokens, sizes = zip(*waiting, strict=True)
                progress.shards.append(
                    write_shard(self.folder, split, progress.rounds, tokens, sizes)
                )
        progress.rounds += 1
        progress.cursor = self.last.cursor
        progress.content_hash = self.last.content_hash
        progress.left_out = self.last.left_out
        fault_point("inside-preparation")
        write_json(self.folder / PROGRESS, asdict(progress))
        self._clear()

    def _clear(self) -> None:
        self.waiting: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {
            split: [] for split in SPLITS
        }
        self.tokens = 0
        self.last: Tokenised | None = None


class _Tokenising:
    """Reads on after `progress`, tokenising a few batches ahead."""

    def __init__(self, target: Target, progress: PreparationProgress) -> None:
        self.reading = _Reading(target.source, progress, *target.fractions)
        # Sizes count the end-of-document token as a token and no byte.
        self.ending = [] if progress.single_document else [end_of_document(target.tokenizer)]
        self.encoder = Encoder(target.tokenizer)
        self.dtype = target.dtype

    def __iter__(self) -> Iterator[Tokenised]:
        groups = document_batches(self.reading, lambda read: len(read.document.text))
        return ahead(self._tokenise, groups)

    @property
    def left_out(self) -> LeftOut:
        return self.reading.left_out

    def _tokenise(self, group: list[Read]) -> Tokenised:
        documents, last = [read.document for read in group], group[-1]
        tokens, sizes = encode_documents(self.encoder, self.ending, documents)
        splits = by_split(tokens.astype(self.dtype), sizes, split_numbers(documents))
        return Tokenised(splits, last.cursor, last.content_hash, last.left_out)


class _Reading:
    """Reads on after `progress`, placing every document, or block of the only one, in a split."""

    def __init__(
        self,
        source: Source,
        progress: PreparationProgress,
        validation_fraction: float,
        test_fraction: float,
    ) -> None:
        self.source = source
        self.fractions = validation_fraction, test_fraction
        self.single_document = progress.single_document
        self.cursor = progress.cursor
        self.content_hash = progress.content_hash
        self.left_out = progress.left_out

    def __iter__(self) -> Iterator[Read]:
        return self._blocks() if self.single_document else self._documents()

    def _documents(self) -> Iterator[Read]:
        for text, cursor in self.source.read(self.cursor):
            if text is None or is_blank(text):
                self.left_out = self.left_out.and_of(text)
                continue
            document = assign_split(text, *self.fractions)
            self.content_hash = chained_hash(self.content_hash, document.digest)
            yield Read(document, cursor, self.content_hash, self.left_out)

    def _blocks(self) -> Iterator[Read]:
        # Read twice: where the splits' bounds lie depends on the length.
        length, digest = 0, hashlib.sha256()
        for chunk in self.source.chunks():
            length += len(chunk)
            digest.update(chunk.encode())
        self.content_hash = digest.hexdigest()
        text = Text(self.source.chunks())
        done = self.cursor["blocks"] if self.cursor else 0
        number = 0
        for split, characters in contiguous_lengths(length, *self.fractions).items():
            for block in blocks(text.take(characters)):
                number += 1
                if number > done:
                    document = Document(block, len(block.encode()), split)
                    yield Read(document, {"blocks": number}, self.content_hash, self.left_out)


def _read_progress(partial: Path) -> PreparationProgress | None:
    path = partial / PROGRESS
    if not path.exists():
        return None
    try:
        return parse_json(PreparationProgress, path.read_bytes())
    except (ValueError, OSError):
        raise UserError(f"{path}: damaged; delete {partial} to prepare it anew") from None


def _lock(folder: Path) -> FileLock:
    """A lock that the operating system releases if this process dies."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.parent / f".{folder.name}.lock", fallback_to_soft=False)
