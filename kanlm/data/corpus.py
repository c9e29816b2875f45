"""One domain of text, ready to be trained and measured on.

`open_corpus` prepares the sources, drops training documents that nearly equal a held-out
document of any of them, and hands out the splits as streams of tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from kanlm.atomic_io import write_atomically
from kanlm.config import DataSettings, TokenizerSettings, to_tree
from kanlm.data.batch_encode import assign_split
from kanlm.data.duplicates import SHINGLE_TOKENS, TokenDocuments, near_duplicates
from kanlm.data.preparation import prepare, training_documents
from kanlm.data.shards import ShardedSource, disk_errors
from kanlm.data.sources import Source, open_sources
from kanlm.data.sources.base import hash_json
from kanlm.data.splits import SPLITS
from kanlm.data.tokenizer import build_tokenizer, decode, wrap
from kanlm.errors import UserError

#: Documents and characters of a source up to which its splits are found before it is prepared.
FEW_DOCUMENTS, FEW_CHARACTERS = 64, 2**24


class Split:
    """A stream of tokens made of whole documents, each with its end-of-document token.

    Attributes:
        n_tokens: tokens in the stream.
        document_tokens, document_words, document_bytes: (documents,) int64, in the order
            of the stream. The end-of-document token counts as a token and as no byte. The
            blocks of a source that is one document stand for documents and have none.
    """

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerFast,
        arrays: Sequence[np.ndarray],
        sizes: Sequence[np.ndarray],
        kept: Sequence[np.ndarray],
    ) -> None:
        """Join shards.

        Args:
            name: of the split.
            tokenizer: to turn documents back into text.
            arrays: tokens of each shard.
            sizes: (documents, 3) tokens, words and bytes of each shard's documents.
            kept: (documents,) bool of each shard: whether a document takes part.
        """
        self.name = name
        self.tokenizer = tokenizer
        rows = [size[keep] for size, keep in zip(sizes, kept, strict=True)]
        table = np.concatenate([np.zeros((0, 3), dtype=np.int64), *rows])
        self.document_tokens, self.document_words, self.document_bytes = table.T.copy()
        self.n_tokens = int(self.document_tokens.sum())
        # Plain arrays over the same files: a memory map is slow to slice.
        self._segments = [
            np.asarray(array)[start:stop]
            for array, size, keep in zip(arrays, sizes, kept, strict=True)
            for start, stop in _runs(size[:, 0], keep)
        ]
        self._starts = np.cumsum([0, *map(len, self._segments)])

    @property
    def n_documents(self) -> int:
        """Documents, or blocks of a single one."""
        return len(self.document_tokens)

    @cached_property
    def document_ends(self) -> np.ndarray:
        """Where each document ends in the stream, (documents,) int64."""
        return np.cumsum(self.document_tokens)

    def token_documents(self, ending: int) -> Iterator[TokenDocuments]:
        """Yield the documents as they lie on the disk; `ending` as in `TokenDocuments`."""
        bounds = np.searchsorted(self.document_ends, self._starts[1:])
        first = 0
        for segment, last in zip(self._segments, bounds, strict=True):
            yield TokenDocuments(segment, self.document_tokens[first : last + 1], ending)
            first = last + 1

    def only(self, kept: np.ndarray) -> "Split":
        """Return the stream of some of the documents; `kept` is (documents,) bool."""
        table = np.stack([self.document_tokens, self.document_words, self.document_bytes], axis=1)
        groups = list(self.token_documents(0))
        stops = np.cumsum([len(group.lengths) for group in groups])[:-1]
        return Split(
            self.name,
            self.tokenizer,
            [group.tokens for group in groups],
            np.split(table, stops),
            np.split(kept, stops),
        )

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens at positions start…stop−1 of the stream, (stop − start,) int64."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens {start}…{stop} of a stream of {self.n_tokens}")
        if start == stop:
            return np.zeros(0, dtype=np.int64)
        return self.windows(np.array([start]), stop - start)[0]

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return `length` tokens from each start on, read in a circle, (starts, length) int64."""
        windows = np.empty((len(starts), length), dtype=np.int64)
        firsts = np.searchsorted(self._starts, starts, side="right") - 1
        within = starts - self._starts[firsts]
        for window, index, start in zip(windows, firsts.tolist(), within.tolist(), strict=True):
            piece = self._segments[index][start : start + length]
            # Nearly always all of it; else the rest is in the segments after.
            while len(piece) < len(window):
                window[: len(piece)] = piece
                window = window[len(piece) :]
                index = (index + 1) % len(self._segments)
                piece = self._segments[index][: len(window)]
            window[:] = piece
        return windows

    def text(self, index: int) -> str:
        """Return document `index`, decoded from its tokens without the end-of-document token."""
        stop = int(self.document_ends[index])
        tokens = self.tokens(stop - int(self.document_tokens[index]), stop)
        if len(tokens) and tokens[-1] == self.tokenizer.eos_token_id:
            tokens = tokens[:-1]
        return decode(self.tokenizer, tokens)

    def texts(self) -> Iterator[str]:
        """Yield every document."""
        return (self.text(index) for index in range(self.n_documents))


@dataclass(frozen=True)
class CorpusSource:
    """One source of a mixture: its share of training and its splits."""

    source: Source
    #: Update → weight from that one on.
    weights: dict[int, float]
    sharded: ShardedSource
    splits: dict[str, Split]
    #: Documents dropped from training as near-duplicates of held-out ones.
    near_duplicates: int


class Corpus:
    """The sources of a domain. Held-out splits join those of all sources, unweighted."""

    def __init__(
        self,
        data: DataSettings,
        tokenizer: PreTrainedTokenizerFast,
        sources: Sequence[CorpusSource],
    ) -> None:
        self.data = data
        self.tokenizer = tokenizer
        self.sources = list(sources)
        self._splits: dict[str, Split] = {}

    def split(self, name: str) -> Split:
        """Return `train`, `validation` or `test`.

        Raises:
            UserError: it holds no document; the line names the fraction to raise.
        """
        if name not in self._splits:
            self._splits[name] = self._join(name)
        return self._splits[name]

    @property
    def notes(self) -> list[str]:
        """What a reader of figures on this text must know: what was left out of each source."""
        lines = []
        for entry in self.sources:
            manifest, several = entry.sharded.manifest, len(self.sources) > 1
            counted = {
                "training documents dropped as near-duplicates of held-out ones": (
                    entry.near_duplicates
                ),
                "documents of white space left out": manifest.empty_documents,
                "rows without text left out": manifest.missing_documents,
            }
            found = [f"{what}: {count:,}" for what, count in counted.items() if count]
            found += manifest.notes
            lines += [f"{entry.source.label}: {line}" if several else line for line in found]
        return lines

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the text and of what decides which of it is trained on, and how much."""
        data = self.data
        rules = [data.validation_fraction, data.test_fraction, data.near_duplicate_threshold]
        texts = [
            (
                entry.sharded.manifest.content_hash,
                entry.weights[0] if len(entry.weights) == 1 else list(entry.weights.items()),
            )
            for entry in self.sources
        ]
        return hash_json([texts, rules])

    @property
    def tokens_hash(self) -> str:
        """Hex sha256 of the very tokens and shares: what a run must find when it resumes."""
        shards = [[shard.sha256 for shard in e.sharded.manifest.shards] for e in self.sources]
        return hash_json([self.fingerprint, shards])

    def check_unchanged(self) -> None:
        """Check that the shards are what they were when they were opened.

        Raises:
            UserError: one is gone or holds something else.
        """
        for entry in self.sources:
            entry.sharded.check_unchanged()

    def _join(self, name: str) -> Split:
        joined = join_splits([entry.splits[name] for entry in self.sources])
        if joined.n_documents:
            return joined
        raise _nothing_in(name, self.data)


def open_corpus(
    data: DataSettings,
    tokenizer: PreTrainedTokenizerFast,
    *,
    report: Callable[[str], None] = lambda line: None,
) -> Corpus:
    """Prepare what is not prepared yet and open the domain.

    Args:
        data: sources, fractions, threshold and cache folder.
        tokenizer: of the model that will read it.
        report: takes lines on what is being done.

    Raises:
        UserError: there is no source, or a source or a folder of shards has something wrong.
    """
    sources = open_sources(data)
    sharded = [prepare(source, tokenizer, data, report=report) for source in sources]
    dropped = _dropped(data, sharded, report)
    entries = []
    for weights, source, opened, drop in zip(data.weights, sources, sharded, dropped, strict=True):
        splits = {name: _open_split(opened, name, tokenizer, drop) for name in SPLITS}
        count = sum(int(mark.sum()) for mark in drop)
        entries.append(CorpusSource(source, weights, opened, splits, count))
        if count:
            report(f"{source.label}: dropped {count} near-duplicates of held-out documents")
    return Corpus(data, tokenizer, entries)


def check_few_documents(data: DataSettings, splits: Sequence[str]) -> None:
    """Check, before anything is prepared, that so few documents give every split one.

    Does nothing where there are many, or so much text that the look would take long.

    Args:
        data: the domain.
        splits: those that are needed, beside training's.

    Raises:
        UserError: one of them gets none, or there is no source.
    """
    found: set[str] = set()
    for source in open_sources(data):
        if not source.local_files() or source.single_document:
            return
        characters = 0
        for number, text in enumerate(source.documents()):
            characters += len(text)
            if number == FEW_DOCUMENTS or characters > FEW_CHARACTERS:
                return
            found.add(assign_split(text, data.validation_fraction, data.test_fraction).split)
    for name in ("train", *splits):
        # Of no text at all the preparation has more to say.
        if found and name not in found:
            raise _nothing_in(name, data)


def _nothing_in(split: str, data: DataSettings) -> UserError:
    """Say how the split may get documents."""
    if split == "train":
        return UserError(
            f"data '{data.domain}': no document is left to train on; "
            "lower data.validation_fraction and data.test_fraction, or give more text"
        )
    setting = f"{split}_fraction"
    return UserError(
        f"data '{data.domain}': no document falls into {split} with data.{setting} = "
        f"{getattr(data, setting)}; raise it, give more text, or leave a text file's separator "
        "out: one text alone is cut in its order, the last parts of it for validation and test"
    )


def open_tokenizer(
    settings: TokenizerSettings,
    data: DataSettings,
    *,
    report: Callable[[str], None] = lambda line: None,
) -> PreTrainedTokenizerFast:
    """Build the tokenizer from the domain's training documents, or reuse it from the cache.

    Args:
        settings: kind, and what belongs to it.
        data: the text that `characters` and `bpe` learn from, and where the cache is.
        report: takes lines on what is being done.

    Raises:
        UserError: there is no training document to learn from.
    """
    if settings.kind not in ("characters", "bpe"):
        return build_tokenizer(settings, lambda: iter(()))
    sources = open_sources(data)

    def texts() -> Iterator[str]:
        for source in sources:
            yield from training_documents(source, data)

    made_of = [source.fingerprint() for source in sources]
    fractions = [data.validation_fraction, data.test_fraction]
    key = hash_json([to_tree(settings), made_of, fractions])[:16]
    path = Path(data.cache_dir) / f"tokenizer-{settings.kind}-{key}.json"
    if path.exists():
        try:
            return wrap(Tokenizer.from_str(path.read_text()))
        except Exception:  # What tokenizers raises is a bare Exception.
            raise UserError(f"{path}: damaged; delete it to have it made anew") from None
    if next(texts(), None) is None:
        raise UserError(
            f"data '{data.domain}': no document to learn a vocabulary from in "
            f"{', '.join(source.label for source in sources)}: there is none, or all is held out"
        )
    report(f"learning a {settings.kind} vocabulary")
    tokenizer = build_tokenizer(settings, texts)
    content = tokenizer.backend_tokenizer.to_str().encode()
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(content))
    return tokenizer


def join_splits(splits: Sequence[Split]) -> Split:
    """Join streams end to end under the name of the first."""
    arrays = [segment for split in splits for segment in split._segments]
    joined = Split(splits[0].name, splits[0].tokenizer, [], [], [])
    for column in ("document_tokens", "document_words", "document_bytes"):
        setattr(joined, column, np.concatenate([getattr(split, column) for split in splits]))
    joined.n_tokens = sum(split.n_tokens for split in splits)
    joined._segments = arrays
    joined._starts = np.cumsum([0, *map(len, arrays)])
    return joined


def _open_split(
    sharded: ShardedSource,
    name: str,
    tokenizer: PreTrainedTokenizerFast,
    dropped: list[np.ndarray],
) -> Split:
    shards = sharded.shards(name)
    sizes = [sharded.documents(shard) for shard in shards]
    if name == "train":
        kept = [~mark for mark in dropped]
    else:
        kept = [np.ones(len(size), dtype=bool) for size in sizes]
    return Split(name, tokenizer, [sharded.tokens(shard) for shard in shards], sizes, kept)


def _dropped(
    data: DataSettings, sharded: list[ShardedSource], report: Callable[[str], None]
) -> list[list[np.ndarray]]:
    """Mark, for each source and training shard, the documents to leave out.

    The one document of a single-document source is never dropped in parts.
    """
    threshold = data.near_duplicate_threshold
    marks = [
        [np.zeros(shard.documents, dtype=bool) for shard in source.shards("train")]
        for source in sharded
    ]
    if threshold is None:
        return marks
    compared = [source for source in sharded if not source.manifest.single_document]
    found = _near_duplicates(data, sharded, compared, threshold, report)
    for source, mark in zip(sharded, marks, strict=True):
        if not source.manifest.single_document:
            mark[:] = [found.pop(0) for _ in mark]
    return marks


def _near_duplicates(
    data: DataSettings,
    sharded: list[ShardedSource],
    compared: list[ShardedSource],
    threshold: float,
    report: Callable[[str], None],
) -> list[np.ndarray]:
    """Mark the near-duplicates in each training shard of `compared`, or recall the marks."""
    checksums = [[shard.sha256 for shard in source.manifest.shards] for source in sharded]
    key = hash_json([SHINGLE_TOKENS, threshold, checksums])[:16]
    path = Path(data.cache_dir) / f"near-duplicates-{key}.npz"
    if path.exists():
        return _recalled(path)
    if compared:
        report(f"{data.domain}: looking for near-duplicates of held-out documents")
    training = [group for source in compared for group in _token_documents(source, "train")]
    held_out = [
        group
        for source in sharded
        for name in ("validation", "test")
        for group in _token_documents(source, name)
    ]
    marks = near_duplicates(training, held_out, threshold)
    with disk_errors(path.parent):
        write_atomically(path, lambda file: np.savez(file, *marks))
    return marks


def _recalled(path: Path) -> list[np.ndarray]:
    try:
        with np.load(path) as saved:
            return [saved[name] for name in saved.files]
    except (ValueError, OSError, EOFError, BadZipFile):
        raise UserError(f"{path}: damaged; delete it to have it made anew") from None


def _token_documents(source: ShardedSource, split: str) -> list[TokenDocuments]:
    return [
        TokenDocuments(source.tokens(shard), source.documents(shard)[:, 0], source.ending)
        for shard in source.shards(split)
    ]


def _runs(lengths: np.ndarray, kept: np.ndarray) -> list[tuple[int, int]]:
    """Return (start, stop), in tokens, of each run of kept documents."""
    ends = np.cumsum(lengths)
    steps = np.diff(np.concatenate([[0], kept.astype(np.int8), [0]]))
    firsts, stops = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    return [
        (int(ends[first] - lengths[first]), int(ends[stop - 1]))
        for first, stop in zip(firsts, stops, strict=True)
    ]
