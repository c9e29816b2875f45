"""Preparing in bounded memory: a text of any size, and one document as far as it can be cut.

The bound is the operating system's: a process that has prepared a little may allocate only so
much more (RLIMIT_DATA), and then prepares a text many times as large. Past the limit an
allocation fails, and the process with it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is Linux's")

WORDS = "the cat sat on a mat and the dog ran to her house in rain with no hat\n"
MEGABYTE = 2**20

#: Prepares texts one after another, each within its own limit, and says what came of each.
PROGRAM = """
import json, re, resource, sys
from pathlib import Path
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from kanlm.config import DataSettings, TokenizerSettings
from kanlm.data import tokenizer as module
from kanlm.data.preparation import prepare
from kanlm.data.sources import make_source
from kanlm.errors import UserError

def in_use():
    return int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def limit(size):
    resource.setrlimit(resource.RLIMIT_DATA, (size, resource.RLIM_INFINITY))

one_token = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
settings = TokenizerSettings(kind="bpe", vocab_size=270)
tokenizers = {
    # A document, or a block, is one unknown word: this costs no time.
    "quick": PreTrainedTokenizerFast(tokenizer_object=one_token, eos_token="</s>"),
    "bpe": module.build_tokenizer(settings, lambda: iter(["the cat sat on a mat in the house"])),
}
tasks, module.BATCH_CHARACTERS = json.loads(sys.argv[1])
for name, path, allowed in tasks:
    limit(in_use() + allowed if allowed else resource.RLIM_INFINITY)
    data = DataSettings(sources=[{"kind": "files", "path": path}], cache_dir=path + ".cache")
    try:
        source, size = make_source(data.sources[0]), 8 * module.BATCH_CHARACTERS
        sharded = prepare(source, tokenizers[name], data, shard_tokens=size)
        print(sum(split["bytes"] for split in sharded.manifest.counts.values()), flush=True)
    except UserError as error:
        print(error, flush=True)
"""


def prepare_within(*tasks: tuple[str, Path, int], batch: int = 2**20) -> list[str]:
    """Prepare texts in a process, each with so many bytes to allocate; 0 sets no limit.

    Args:
        batch: characters that are tokenised at once.
    """
    named = [(name, str(path), allowed) for name, path, allowed in tasks]
    arguments = json.dumps([named, batch])
    # What an allocator keeps for each thread would count too.
    environment = {**os.environ, "RAYON_NUM_THREADS": "2", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def write_documents(path: Path, size: int) -> int:
    """Write JSONL, 4 kB a document; return the bytes of text."""
    text = WORDS * 58
    total = 0
    with path.open("w") as file:
        for number in range(size // len(text)):
            document = f"{number} {text}"
            file.write(json.dumps({"text": document}) + "\n")
            total += len(document)
    return total


def write_text(path: Path, size: int) -> int:
    """Write one document with nothing that would divide it; return its bytes."""
    with path.open("w") as file:
        for _ in range(size // len(WORDS) // 1000):
            file.write(WORDS * 1000)
    return path.stat().st_size


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    write_documents(tmp_path / "warm.jsonl", 8 * MEGABYTE)
    write_text(tmp_path / "warm.txt", 8 * MEGABYTE)
    write_text(tmp_path / "warm-bpe.txt", MEGABYTE)
    documents = write_documents(tmp_path / "large.jsonl", 64 * MEGABYTE)
    one = write_text(tmp_path / "large.txt", 64 * MEGABYTE)
    line = WORDS * (4 * MEGABYTE // len(WORDS))
    for name, text in (("line", line), ("too-large", "b" * 100 * MEGABYTE)):
        lines = [json.dumps({"text": each}) + "\n" for each in ("a", text)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    found = prepare_within(
        ("quick", tmp_path / "warm.jsonl", 0),
        ("quick", tmp_path / "warm.txt", 0),
        ("bpe", tmp_path / "warm-bpe.txt", 0),
        ("quick", tmp_path / "large.jsonl", 24 * MEGABYTE),
        ("quick", tmp_path / "large.txt", 24 * MEGABYTE),
        # Several copies of the text, and a batch; as a whole it would take twice as much.
        ("bpe", tmp_path / "line.jsonl", 180 * MEGABYTE),
        ("quick", tmp_path / "too-large.jsonl", 100 * MEGABYTE),
    )[3:]
    refusal = f"{tmp_path / 'too-large.jsonl'}: document 2 does not fit in memory; divide it"
    assert found == [str(documents), str(one), str(len(line) + 1), refusal]


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_documents, write_text])
def test_memory_does_not_grow_with_the_tokens(
    write: Callable[[Path, int], int], tmp_path: Path
) -> None:
    name = "text.jsonl" if write is write_documents else "text.txt"
    (tmp_path / "warm").mkdir()
    write(tmp_path / "warm" / name, 8 * MEGABYTE)
    size = write(tmp_path / name, 64 * MEGABYTE)
    found = prepare_within(
        ("bpe", tmp_path / "warm" / name, 0),
        ("bpe", tmp_path / name, 24 * MEGABYTE),
        batch=2**17,
    )
    assert found[1] == str(size)
