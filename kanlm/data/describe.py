"""What a config would train on, for a person to look at before paying for it."""

from itertools import permutations
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from kanlm.config import DataSettings
from kanlm.data.corpus import Corpus, CorpusSource, Split, open_corpus
from kanlm.data.duplicates import distinct_shingles
from kanlm.data.splits import BLOCK_CHARACTERS, SPLITS
from kanlm.data.tokenizer import tokenizer_hash, vocabulary_size
from kanlm.errors import UserError

#: Shingles of a split or source that are held in memory to measure overlap.
OVERLAP_SHINGLES = 2**22
SAMPLE_CHARACTERS = 600


def describe(data: DataSettings, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Prepare the domain if need be and sum it up.

    Returns:
        JSON-ready: `domain`, `fingerprint`, `vocab_size`, `tokenizer_hash`; `sources`, each
        with its `splits` (documents, bytes, words, tokens, bytes_per_token after dropping),
        `weights` by the update from which on they hold, `near_duplicates`, `empty_documents`,
        `missing_documents` and hashes; `splits` over all sources; `overlap`, from "A in B" to
        the share of A's distinct 8-token shingles that occur in B, between the splits and
        between the sources; `problems`, a line for each held-out split that holds nothing, for
        which a run would be refused; and a `sample` of training text.

    Raises:
        UserError: as `open_corpus`.
    """
    corpus = open_corpus(data, tokenizer)
    train = corpus.split("train")
    return {
        "domain": data.domain,
        "fingerprint": corpus.fingerprint,
        "vocab_size": vocabulary_size(tokenizer),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "sources": [_describe_source(entry) for entry in corpus.sources],
        "splits": {
            name: _sizes([entry.splits[name] for entry in corpus.sources]) for name in SPLITS
        },
        "overlap": _overlap(corpus),
        "problems": _problems(corpus),
        "sample": train.text(train.n_documents // 2)[:SAMPLE_CHARACTERS],
    }


def print_description(data: DataSettings, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print what `describe` finds."""
    found = describe(data, tokenizer)
    console = Console()
    console.print(f"domain {found['domain']}, {found['vocab_size']:,} tokens in the vocabulary")
    console.print(f"data sha256 {found['fingerprint']}", highlight=False)
    for source in found["sources"]:
        for line in _source_lines(source):
            console.print(Text(line), soft_wrap=True)
    console.print(_table(found))
    for names, share in found["overlap"].items():
        console.print(f"overlap: {share:.2%} of the 8-token sequences of {names}", highlight=False)
    for problem in found["problems"]:
        console.print(Text(f"warning: {problem}", style="bold"), soft_wrap=True)
    console.rule("a sample of training text")
    console.print(Text(found["sample"]))


def _describe_source(entry: CorpusSource) -> dict[str, Any]:
    manifest = entry.sharded.manifest
    return {
        "label": entry.source.label,
        "description": manifest.source,
        "weights": {str(step): weight for step, weight in entry.weights.items()},
        "folder": str(entry.sharded.folder),
        "source_hash": manifest.source_hash,
        "content_hash": manifest.content_hash,
        "single_document": manifest.single_document,
        "near_duplicates": entry.near_duplicates,
        "empty_documents": manifest.empty_documents,
        "missing_documents": manifest.missing_documents,
        "notes": manifest.notes,
        "splits": {name: _sizes([entry.splits[name]]) for name in SPLITS},
    }


def _sizes(splits: list[Split]) -> dict[str, Any]:
    tokens = sum(split.n_tokens for split in splits)
    size = int(sum(split.document_bytes.sum() for split in splits))
    return {
        "documents": sum(split.n_documents for split in splits),
        "bytes": size,
        "words": int(sum(split.document_words.sum() for split in splits)),
        "tokens": tokens,
        "bytes_per_token": size / tokens if tokens else None,
    }


def _problems(corpus: Corpus) -> list[str]:
    """List what a run would be refused for."""
    problems = []
    for name in SPLITS:
        try:
            corpus.split(name)
        except UserError as error:
            problems.append(str(error))
    return problems


def _overlap(corpus: Corpus) -> dict[str, float]:
    """Measure how much of one part of the domain occurs in another."""
    tokens = sum(split.n_tokens for entry in corpus.sources for split in entry.splits.values())
    rate = min(1.0, OVERLAP_SHINGLES / tokens)
    parts = {
        name: _shingles_of([(entry, name) for entry in corpus.sources], rate) for name in SPLITS
    }
    shares = {}
    for small, large in (("validation", "train"), ("test", "train"), ("test", "validation")):
        shares[f"{small} in {large}"] = _share(parts[small], parts[large])
    if len(corpus.sources) > 1:
        by_source = [_shingles_of([(e, name) for name in SPLITS], rate) for e in corpus.sources]
        for first, second in permutations(range(len(by_source)), 2):
            names = [f"{corpus.sources[i].source.label} ({i + 1})" for i in (first, second)]
            shares[" in ".join(names)] = _share(by_source[first], by_source[second])
    return {names: share for names, share in shares.items() if share is not None}


def _shingles_of(parts: list[tuple[CorpusSource, str]], rate: float) -> np.ndarray:
    groups = (
        group
        for entry, name in parts
        for group in entry.splits[name].token_documents(entry.sharded.ending)
    )
    return distinct_shingles(groups, rate)


def _share(part: np.ndarray, whole: np.ndarray) -> float | None:
    """Return |part ∩ whole| / |part|, or None of nothing."""
    if not len(part):
        return None
    return len(np.intersect1d(part, whole, assume_unique=True)) / len(part)


def _source_lines(source: dict[str, Any]) -> list[str]:
    weights = [
        f"{weight:g}" + (f" from update {step} on" if step != "0" else "")
        for step, weight in source["weights"].items()
    ]
    lines = [
        f"{source['label']}: {source['description']}, weight {', '.join(weights)}",
        f"  sha256 of the text {source['content_hash']}",
    ]
    if source["single_document"]:
        lines.append(
            "  one document: split contiguously in the order of its text; documents below are "
            f"blocks of about {BLOCK_CHARACTERS:,} characters"
        )
    lines.append(
        f"  left out: {source['near_duplicates']:,} near-duplicates of held-out documents, "
        f"{source['empty_documents']:,} documents of white space, "
        f"{source['missing_documents']:,} rows without text"
    )
    return lines + [f"  {note}" for note in source["notes"]]


def _table(found: dict[str, Any]) -> Table:
    table = Table("source", "split", box=SIMPLE_HEAD, padding=0)
    for name in ("documents", "bytes", "words", "tokens", "bytes/token"):
        table.add_column(name, justify="right", no_wrap=True)
    groups = [(source["label"], source["splits"]) for source in found["sources"]]
    if len(groups) > 1:
        groups.append(("all", found["splits"]))
    for label, splits in groups:
        for name, sizes in splits.items():
            counts = [f"{sizes[key]:,}" for key in ("documents", "bytes", "words", "tokens")]
            ratio = sizes["bytes_per_token"]
            table.add_row(label, name, *counts, "" if ratio is None else f"{ratio:.2f}")
            label = ""
    return table
