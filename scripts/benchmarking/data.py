"""Speed of preparing text, and of cutting batches out of it.

1. Documents of a source are written to one JSONL file, as a corpus would be had.
2. Preparing that file, to the last shard on the disk, takes turns with the tokenizer alone,
   which is given all documents at once, in memory: that is the floor.
3. Batches, as the trainer gets them, take turns with numpy copying the same batch.
"""

import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from benchmarking.measure import interleaved, ratio
from benchmarking.report import Results, markdown_table, rules, where
from kanlm.config import DataSettings, TokenizerSettings
from kanlm.data.corpus import open_corpus
from kanlm.data.loader import Batches
from kanlm.data.preparation import prepare
from kanlm.data.sources import make_source, parse_source_argument
from kanlm.data.tokenizer import Encoder, build_tokenizer, wrap
from kanlm.errors import UserError
from kanlm.reporting.format import count, fixed, span
from kanlm.reporting.table import Table
from kanlm.training.run import peak_resident_bytes

_ROOT = Path(__file__).resolve().parents[1]
#: Tokens in the batches that are timed as one.
_TOKENS = 2**20

#: Tokenizers that need no download.
TrainedHere = Literal["bytes", "characters", "bpe"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """From text to batches."""

    #: stdlib-prose, stdlib-code, hub:NAME, a path or a glob.
    source: str = "stdlib-code"
    #: Of its text, at most.
    megabytes: float = 12.0
    #: The first also makes the tokens that batches are cut from.
    tokenizers: tuple[TrainedHere, ...] = ("bpe", "bytes")
    #: Of bpe.
    vocab_size: int = 8192
    context_lengths: tuple[int, ...] = (128, 512, 2048)
    #: In a batch.
    batch_tokens: int = 2**16
    rounds: int = 5
    output_dir: str = "runs/bench/data"

    def __post_init__(self) -> None:
        if not self.tokenizers:
            raise ValueError("tokenizers = []: expected at least one")
        if not self.megabytes > 0:
            raise ValueError(f"megabytes = {self.megabytes}: expected more than 0")


# Measuring


def measure(settings: Settings, report: Callable[[str], object]) -> list[dict]:
    """Return one row a tokenizer, then one a context length: speed over that of the floor.

    Raises:
        UserError: the source is none, or has too little text for a context.
    """
    documents = _documents(settings)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "documents.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        rows = []
        for kind in settings.tokenizers:
            report(f"{kind}: preparing")
            rows.append(_measure_preparing(settings, kind, documents, path))
        tokenizer = _build(settings, settings.tokenizers[0], documents)
        for context_length in settings.context_lengths:
            report(f"batches of {context_length}")
            rows.append(_measure_batches(settings, context_length, tokenizer, path))
    return rows


def _documents(settings: Settings) -> list[str]:
    """Return the source's first documents."""
    source = make_source(parse_source_argument(settings.source))
    documents, size = [], 0
    for text in source.documents():
        documents.append(text)
        size += len(text.encode())
        if size >= settings.megabytes * 1e6:
            break
    if not documents:
        raise UserError(f"source = {settings.source}: holds no text")
    return documents


def _build(settings: Settings, kind: TrainedHere, documents: list[str]) -> PreTrainedTokenizerFast:
    size = settings.vocab_size if kind == "bpe" else None
    return build_tokenizer(TokenizerSettings(kind=kind, vocab_size=size), lambda: iter(documents))


def _data(path: Path, cache: str) -> DataSettings:
    return DataSettings(
        sources=[{"kind": "files", "path": str(path)}],
        cache_dir=str(path.parent / cache),
        near_duplicate_threshold=None,
    )


def _measure_preparing(
    settings: Settings, kind: TrainedHere, documents: list[str], path: Path
) -> dict:
    tokenizer = _build(settings, kind, documents)
    caches = (f"{kind}-{number}" for number in itertools.count())
    seconds = interleaved(
        {
            "ours": lambda: _prepare(tokenizer, path, next(caches)),
            "alone": lambda: _encode(tokenizer, documents),
        },
        settings.rounds,
        lambda: None,
    )
    median = sorted(seconds["ours"])[settings.rounds // 2]
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    tokens = sum(map(len, _encode(tokenizer, documents)))
    return {
        "what": "preparing",
        "tokenizer": kind,
        "speed_ratio": ratio(seconds["alone"], seconds["ours"]),
        "seconds": median,
        "megabytes": megabytes,
        "documents": len(documents),
        "tokens": tokens,
        "tokens_per_second": tokens / median,
        "megabytes_per_second": megabytes / median,
        "peak_memory_bytes": _memory_of_preparing(tokenizer, path, next(caches)),
    }


def _prepare(tokenizer: PreTrainedTokenizerFast, path: Path, cache: str) -> None:
    data = _data(path, cache)
    prepare(make_source(data.sources[0]), tokenizer, data)


def _encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> list[Encoding]:
    """Do what the library does alone, with a tokenizer that remembers no words yet, as ours."""
    return Encoder(tokenizer).backend.encode_batch_fast(documents, add_special_tokens=False)


def _memory_of_preparing(tokenizer: PreTrainedTokenizerFast, path: Path, cache: str) -> int:
    """Measure by how much preparing in a new process raises the largest memory that it has used."""
    saved = path.with_name(f"{cache}.json")
    saved.write_text(tokenizer.backend_tokenizer.to_str())
    code = "import sys; from benchmarking.data import print_rise; print_rise(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(saved), str(path), cache]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=_ROOT)
    return int(done.stdout)


def print_rise(tokenizer: str, path: str, cache: str) -> None:
    """Prepare, and print by how many bytes that raised this process's largest memory."""
    wrapped = wrap(Tokenizer.from_file(tokenizer))
    before = peak_resident_bytes()
    _prepare(wrapped, Path(path), cache)
    print(peak_resident_bytes() - before)


def _measure_batches(
    settings: Settings, context_length: int, tokenizer: PreTrainedTokenizerFast, path: Path
) -> dict:
    batch_size = max(settings.batch_tokens // context_length, 1)
    batches = Batches(
        open_corpus(_data(path, "batches"), tokenizer),
        seed=0,
        batch_size=batch_size,
        context_length=context_length,
        attention_within_documents=False,
    )
    count = max(_TOKENS // (batch_size * context_length), 1)
    steps = itertools.count()
    arrays = [value.numpy() for value in batches.batch(0).values()]
    seconds = interleaved(
        {"ours": lambda: _cut(batches, steps, count), "copy": lambda: _copy(arrays, count)},
        settings.rounds,
        lambda: None,
    )
    median = sorted(seconds["ours"])[settings.rounds // 2]
    tokens = count * batch_size * context_length
    return {
        "what": "batches",
        "tokenizer": settings.tokenizers[0],
        "context_length": context_length,
        "batch_size": batch_size,
        "speed_ratio": ratio(seconds["copy"], seconds["ours"]),
        "seconds": median,
        "tokens": tokens,
        "tokens_per_second": tokens / median,
    }


def _cut(batches: Batches, steps: "itertools.count[int]", count: int) -> None:
    for step in itertools.islice(steps, count):
        batches.batch(step)


def _copy(arrays: list[np.ndarray], count: int) -> None:
    for _ in range(count):
        for array in arrays:
            array.copy()


# Showing


def tables(results: Results) -> list[Table]:
    """Tabulate a row a tokenizer, then one a context length."""
    groups = [where(results, what=what) for what in ("preparing", "batches")]

    def cells(row: Results) -> list[str]:
        length = row.get("context_length")
        return [
            row["what"] + ("" if length is None else f" of {row['batch_size']} × {length}"),
            row["tokenizer"],
            fixed(row["speed_ratio"]["median"], 2),
            span([row["speed_ratio"]["low"], row["speed_ratio"]["high"]], 2),
            count(row["tokens_per_second"]),
            fixed(row.get("megabytes_per_second"), 1),
            count(row.get("peak_memory_bytes"), "B"),
        ]

    text = groups[0][0]
    table = Table(
        title=f"{text['megabytes']:.1f} MB of {results['settings']['source']} "
        f"in {text['documents']:,} documents",
        columns=["what", "tokenizer", "× floor", "quartiles", "tokens/s", "MB/s", "memory"],
        rows=[cells(row) for group in groups for row in group],
        note="Speed over that of a floor: for preparing (read, tokenise, write) the tokenizers "
        "library given all documents at once, on all cores; for batches numpy copying one. "
        "Memory is what preparing adds to a process at most.",
        rules=rules(groups),
    )
    return [table]


def section(results: Results) -> str:
    """Return the benchmark's part of the page, in Markdown."""
    rows = [
        [
            row["what"] + (f", context {row['context_length']}" if "context_length" in row else ""),
            row["tokenizer"],
            fixed(row["speed_ratio"]["median"], 2),
            count(row["tokens_per_second"]),
        ]
        for row in results["rows"]
    ]
    heads = ["what", "tokenizer", "× floor's speed", "tokens/s"]
    return (
        "**Text on its way to a model**: preparing, beside `tokenizers` alone on all cores; "
        "cutting batches, beside numpy copying them.\n\n" + markdown_table(heads, rows)
    )
