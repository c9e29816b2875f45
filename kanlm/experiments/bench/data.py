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
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from kanlm.config import DataSettings, TokenizerSettings
from kanlm.data.corpus import open_corpus
from kanlm.data.loader import Batches
from kanlm.data.preparation import prepare
from kanlm.data.sources import make_source, parse_source_argument
from kanlm.data.tokenizer import Encoder, build_tokenizer, wrap
from kanlm.errors import UserError
from kanlm.experiments.bench.settings import DataBenchmark, TrainedHere
from kanlm.experiments.bench.timing import interleaved, ratio
from kanlm.training.run import peak_resident_bytes

#: Tokens in the batches that are timed as one.
_TOKENS = 2**20


def measure_data(settings: DataBenchmark, report: Callable[[str], object]) -> list[dict]:
    """One row a tokenizer, then one a context length: speed over that of the floor.

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


def _documents(settings: DataBenchmark) -> list[str]:
    """The source's first documents."""
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


def _build(
    settings: DataBenchmark, kind: TrainedHere, documents: list[str]
) -> PreTrainedTokenizerFast:
    size = settings.vocab_size if kind == "bpe" else None
    return build_tokenizer(TokenizerSettings(kind=kind, vocab_size=size), lambda: iter(documents))


def _data(path: Path, cache: str) -> DataSettings:
    return DataSettings(
        sources=[{"kind": "files", "path": str(path)}],
        cache_dir=str(path.parent / cache),
        near_duplicate_threshold=None,
    )


def _measure_preparing(
    settings: DataBenchmark, kind: TrainedHere, documents: list[str], path: Path
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
    """What the library does alone, with a tokenizer that remembers no words yet, as ours."""
    return Encoder(tokenizer).backend.encode_batch_fast(documents, add_special_tokens=False)


def _memory_of_preparing(tokenizer: PreTrainedTokenizerFast, path: Path, cache: str) -> int:
    """By how much preparing in a new process raises the largest memory that it has used."""
    saved = path.with_name(f"{cache}.json")
    saved.write_text(tokenizer.backend_tokenizer.to_str())
    code = (
        "import sys; from kanlm.experiments.bench.data import print_rise; print_rise(*sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, str(saved), str(path), cache]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def print_rise(tokenizer: str, path: str, cache: str) -> None:
    """Prepare, and print by how many bytes that raised this process's largest memory."""
    wrapped = wrap(Tokenizer.from_file(tokenizer))
    before = peak_resident_bytes()
    _prepare(wrapped, Path(path), cache)
    print(peak_resident_bytes() - before)


def _measure_batches(
    settings: DataBenchmark, context_length: int, tokenizer: PreTrainedTokenizerFast, path: Path
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
