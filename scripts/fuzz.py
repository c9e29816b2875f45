"""What reads files of other people takes them, or says in one line what is wrong with them.

Good files are damaged at random: bytes changed, cut out, doubled and swapped in from other
files, and words put in that mean something to YAML, JSON or a file system. A reader may raise
`UserError`, in one line, and nothing else; it must not take seconds; and it must write nothing
outside the folder, nor run code.
"""

import argparse
import bz2
import csv
import gzip
import io
import json
import lzma
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow
import torch
from pyarrow import parquet
from safetensors.torch import save_file

from kanlm.config import Config, check, from_tree, load, to_yaml
from kanlm.data.preparation import PROGRESS, _read_progress
from kanlm.data.shards import FORMAT_VERSION, ShardedSource
from kanlm.data.sources.files import Files
from kanlm.data.tokenizer import build_tokenizer, end_of_document
from kanlm.errors import UserError
from kanlm.evaluation.perplexity import Evaluation
from kanlm.experiments import sweep
from kanlm.experiments.derive import derive
from kanlm.experiments.launch import _last_training_line
from kanlm.experiments.result_files import read_documents, write_results
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.accounting import account
from kanlm.reporting import page
from kanlm.reporting.study import read_study
from kanlm.results.read import read_run_results, records_of
from kanlm.results.schema import EvaluationKey, Note, Record, References, Trial
from kanlm.training.checkpointing.export import load_tokenizer, load_trained, write_model
from kanlm.training.checkpointing.reader import checkpoint_to_resume, read_state
from kanlm.training.checkpointing.tensors import StoredTensors, load_weights
from kanlm.training.progress import figures
from kanlm.training.resolve import resolve
from kanlm.training.state import TrainingState
from kanlm.training.tracking import first_lines

#: Seconds that no input may take.
SLOWEST = 5.0

WORDS = [
    b"!!python/object/apply:os.system ['touch CANARY']",
    b"!!python/name:os.system",
    b"!!binary aGk=",
    b"!!set {a, b}",
    b"!!timestamp 2001-01-01",
    b"2001-01-01",
    b"${oc.env:HOME}",
    b"${oc.decode:'{a: 1}'}",
    b"${model}",
    b"${",
    b"???",
    b"&a [*a]",
    b"*a",
    b"&a ",
    b"<<: *a",
    b"---\n",
    b"...",
    b"? ",
    b"- " * 200,
    b"[" * 2000,
    b"{" * 2000,
    b'{"a":' * 2000,
    b"9" * 5000,
    b"1e999",
    b"-1",
    b"0",
    b"NaN",
    b"Infinity",
    b".nan",
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'""',
    b"../../../../tmp/CANARY",
    b"/etc/passwd",
    b"\x00",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b'"\\ud800"',
    b"\r\n",
    b"\n",
    b"\t",
    b":",
    b",",
    b'"',
    b"#",
    b"base: config.yaml",
    b"study: {launcher: touch CANARY, arms: {a: {}}}",
]

CONFIGS = [
    b"model: {d_model: 16, feed_forward: kan}\ntraining: {steps: 3, grid_schedule: {0: 2, 2: 4}}\n",
    b"""output_dir: runs/a
data:
  domain: words
  sources: [{kind: files, path: words.txt, weight: {0: 2.0, 500: 1}}, stdlib-prose]
tokenizer: {kind: bpe, vocab_size: 300}
model:
  n_layers: 2
  feed_forward:
    - {kind: swiglu, repeat: 1}
    - {kind: kan-local, basis: &b {kind: bspline, degree: 2}}
optimizer: {learning_rate: 1e-3, betas: [0.9, 0.95]}
""",
    b"""base: base.yaml
study:
  seeds: [0, 1]
  arms:
    kan: {}
    gelu: {model: {feed_forward: gelu}}
  grid: {optimizer.learning_rate: [1e-3, 3e-3]}
  stages: [{data: {domain: code, sources: stdlib-code}}]
""",
]
SETTINGS = {
    "tokenizer": "bytes",
    "model": {
        "d_model": 16,
        "n_layers": 2,
        "n_heads": 2,
        "context_length": 16,
        "feed_forward": {"kind": "kan-local", "basis": {"kind": "bspline", "degree": 2}},
    },
}
LINES = b"""{"kind": "train", "step": 1, "loss": 5.25, "bits_per_byte": 7.5, "tokens": 64}
{"kind": "validation", "step": 2, "domain": "words", "nats_per_token": 4.5, "bits_per_byte": 6.5}
{"kind": "sample", "step": 2, "prompt": "a", "text": "a c\\u00e4t"}
{"kind": "train", "step": 2, "loss": 5.0, "bits_per_byte": 7.25, "tokens": 128}
"""
DOCUMENTS = b"""{"text": "a cat sat on a mat", "id": 1}
{"text": "\\u00e9t\\u00e9 \xc3\xa9", "meta": {"a": [1, 2]}}

{"id": 3, "text": ""}
"""


def damaged(good: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """Change a few places of a good file."""
    content = bytearray(good)
    for _ in range(draw.choice((1, 1, 2, 3, 8))):
        start = draw.randrange(len(content) + 1)
        stop = min(len(content), start + draw.choice((0, 1, 4, 20, 100)))
        kind = draw.randrange(7)
        if kind == 0 and content:
            content[start % len(content)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del content[start:stop]
        elif kind == 2:
            content[start:start] = content[start:stop] * draw.choice((1, 2, 50))
        elif kind == 3:
            content[start:stop] = draw.choice(WORDS)
        elif kind == 4:
            other = draw.choice(others)
            piece = draw.randrange(len(other))
            content[start:stop] = other[piece : piece + draw.choice((1, 10, 100))]
        elif kind == 5:
            del content[start:]
        else:
            content[start:stop] = draw.randbytes(draw.choice((1, 3, 10)))
    return bytes(content[: 2**17])


class Readers:
    """What reads a file in `folder`, each with good files to start from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "base.yaml").write_bytes(CONFIGS[0])
        self.shards = folder / "shards"
        self.shards.mkdir()
        self.checkpoint = folder / "checkpoints" / "step-00000001"
        self.checkpoint.mkdir(parents=True)
        (folder / "checkpoints" / "latest").write_text(self.checkpoint.name)
        digest = "0" * 64
        names = ("train-00000.tokens.npy", "train-00000.documents.npy")
        shard = {
            "split": "train",
            "name": "train-00000",
            "tokens": 0,
            "documents": 0,
            "words": 0,
            "bytes": 0,
            "sha256": dict.fromkeys(names, digest),
        }
        zeros = dict.fromkeys(("tokens", "documents", "words", "bytes"), 0)
        manifest = {
            "format_version": FORMAT_VERSION,
            "source_hash": digest,
            "source": "words",
            "content_hash": digest,
            "notes": [],
            "tokenizer_hash": digest,
            "end_of_document": 256,
            "dtype": "uint16",
            "validation_fraction": 0.1,
            "test_fraction": 0.1,
            "single_document": False,
            "empty_documents": 0,
            "missing_documents": 0,
            "counts": dict.fromkeys(("train", "validation", "test"), zeros),
            "shards": [shard],
        }
        progress = {"single_document": False, "cursor": {"file": 0}, "shards": [shard]}
        index = {"format_version": 1, "files": {"state.json": {"bytes": 2, "sha256": digest}}}
        state = {"step": 3, "tokens": 9, "seconds": 0.5, "best_loss": None, "window": {"loss": 1.5}}
        parts = folder / "parts"
        parts.mkdir()
        for rank, rows in enumerate((3, 2)):
            save_file({"a": torch.zeros(rows, 2)}, parts / f"model-rank-{rank}.safetensors")
        shards = {"model": {"a": {"shape": [5, 2], "parts": [[0, 0, 3], [1, 3, 5]]}}}
        self.study, self.run = folder / "study", folder / "run"
        config = resolve(from_tree(SETTINGS))
        make_study(self.study, config)
        make_model(self.run, config)
        self.trained = load_trained(self.run)
        self.good = {path.name: path.read_bytes() for path in (self.run / "model").iterdir()}
        one = self.study / "kan" / "seed-0" / "stage-0-words" / "results.json"
        self.kinds: dict[str, tuple[list[bytes], Callable[[bytes], object]]] = {
            "config": ([*CONFIGS, to_yaml(from_tree({})).encode()], self.config),
            "manifest": ([_json(manifest)], self.manifest),
            "progress of a preparation": ([_json(progress)], self.progress),
            "index of a checkpoint": ([_json(index)], self.index),
            "shards.json of a checkpoint": ([_json(shards)], self.stored),
            "state of a checkpoint": ([_json(state)], self.state),
            "metrics.jsonl": ([LINES], self.metrics),
            "metrics.jsonl of a report": ([LINES], self.log),
            "results.json of a study": ([(self.study / "results.json").read_bytes()], self.results),
            "results.json of a run": ([one.read_bytes()], self.run_results),
            "documents.jsonl": ([(self.study / "documents.jsonl").read_bytes()], self.sums),
            **{
                f"documents in {name}": (goods, partial(self.documents, name))
                for name, goods in document_files().items()
            },
            "config.json of a model": ([self.good["config.json"]], self.model),
            "weights of a model": ([self.good["model.safetensors"]], self.weights),
            **{
                f"{name} of a model": ([self.good[name]], partial(self.tokenizer, name))
                for name in ("tokenizer.json", "tokenizer_config.json")
            },
        }

    def config(self, content: bytes) -> None:
        path = self.folder / "config.yaml"
        path.write_bytes(content)
        to_yaml(load(path))

    def manifest(self, content: bytes) -> None:
        (self.shards / "manifest.json").write_bytes(content)
        ShardedSource(self.shards, {"source_hash": "0" * 64})

    def progress(self, content: bytes) -> None:
        (self.shards / PROGRESS).write_bytes(content)
        _read_progress(self.shards)

    def index(self, content: bytes) -> None:
        (self.checkpoint / "state.json").write_bytes(b"{}")
        (self.checkpoint / "index.json").write_bytes(content)
        checkpoint_to_resume(self.checkpoint.parent, lambda line: None)

    def stored(self, content: bytes) -> None:
        (self.folder / "parts" / "shards.json").write_bytes(content)
        tensors = StoredTensors(self.folder / "parts", "model")
        for name, shape in tensors.shapes.items():
            tensors.rows(name, 0, shape[0] if shape else 1)

    def state(self, content: bytes) -> None:
        (self.checkpoint / "state.json").write_bytes(content)
        check(TrainingState, read_state(self.checkpoint), "state.json")

    def metrics(self, content: bytes) -> None:
        path = self.folder / "metrics.jsonl"
        path.write_bytes(content)
        line = _last_training_line(path)
        if line is not None:
            figures(line)
        first_lines(path, 2)

    def log(self, content: bytes) -> None:
        path = self.study / "kan" / "seed-0" / "stage-0-words" / "metrics.jsonl"
        path.write_bytes(content)
        try:
            page.render(read_study(self.study))
        finally:
            path.write_bytes(LINES)

    def results(self, content: bytes) -> None:
        path = self.study / "results.json"
        good = path.read_bytes()
        path.write_bytes(content)
        try:
            page.render(read_study(self.study))
        finally:
            path.write_bytes(good)

    def run_results(self, content: bytes) -> None:
        path = self.folder / "results.json"
        path.write_bytes(content)
        results, _ = read_run_results(path)
        records_of(results)

    def sums(self, content: bytes) -> None:
        path = self.folder / "documents.jsonl"
        path.write_bytes(content)
        read_documents(path)

    def model(self, content: bytes) -> None:
        path = self.run / "model" / "config.json"
        path.write_bytes(content)
        try:
            load_trained(self.run)
        finally:
            path.write_bytes(self.good[path.name])

    def weights(self, content: bytes) -> None:
        (self.folder / "model.safetensors").write_bytes(content)
        load_weights(self.trained, self.folder)

    def tokenizer(self, name: str, content: bytes) -> None:
        path = self.run / "model" / name
        path.write_bytes(content)
        try:
            load_tokenizer(self.run).encode("a cat sat on a mat")
        finally:
            path.write_bytes(self.good[name])

    def documents(self, name: str, content: bytes) -> None:
        (self.folder / name).write_bytes(content)
        list(Files(self.folder, path=name).documents())


def document_files() -> dict[str, list[bytes]]:
    """Name → contents of files in every format and packing, of several streams where it may be."""
    rows = [json.loads(line) for line in DOCUMENTS.splitlines() if line]
    texts = [row["text"] for row in rows]
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"text": texts}), sink)
    delimited = {}
    for delimiter in ",\t":
        file = io.StringIO()
        csv.writer(file, delimiter=delimiter).writerows(
            [("id", "text"), *enumerate([*texts, 'a "quoted", field\tand\nline'])]
        )
        delimited[delimiter] = file.getvalue().encode()
    packers = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
    }
    return {
        "a.jsonl": [DOCUMENTS],
        "a.txt": ["\r\n".join(texts).encode()],
        "a.json": [DOCUMENTS, _json(rows), b"\n".join(map(_json, rows))],
        "a.csv": [delimited[","]],
        "a.tsv": [delimited["\t"]],
        "a.parquet": [sink.getvalue().to_pybytes()],
        **{
            f"a.jsonl.{suffix}": [pack(DOCUMENTS) * 2, pack(DOCUMENTS) + bytes(4) + pack(b"")]
            for suffix, pack in packers.items()
        },
    }


def make_study(folder: Path, config: Config) -> None:
    """Results of two arms, two seeds and two stages, with the logs and results of their runs."""
    accounting = account(config.model, 257)
    facts = {
        "feed_forward": accounting.feed_forward,
        "parameters": accounting.parameters["total"],
        "feed_forward_parameters": accounting.parameters["feed_forward"],
        "flops_per_token": accounting.flops_per_token["total"],
        "bytes_per_decoded_token": accounting.bytes_per_decoded_token(),
        "train_tokens": 4096,
        "train_seconds": 2.5,
        "compile_seconds": 0.0,
        "tokens_per_second": 1638.4,
        "peak_memory_bytes": 10**9,
        "steps": 18,
        "skipped_steps": 1,
        "best_validation": {"nats_per_token": 2.5, "step": 9},
        "accounting": asdict(accounting),
    }
    trials = [
        Trial({"optimizer.learning_rate": 0.001}, "finished", 2.5, 9, chosen=False),
        Trial({"optimizer.learning_rate": 0.003}, "diverged", None, 4, chosen=False),
    ]
    tried = sweep.record(sweep.choose(trials, "kan"), seed=0, domain="words", others=1)
    domains, draw = ["words", "code"], np.random.default_rng(0)
    evaluations: dict[EvaluationKey, Evaluation] = {}
    for arm, seed, stage, domain in product(("kan", "gelu"), (0, 1), (0, 1), domains):
        key = EvaluationKey(
            arm=arm, seed=seed, strategy="plain", stage=stage, domain=domain, step=9, split="test"
        )
        counts = {"tokens": [50, 40, 60], "words": [9, 8, 11], "bytes": [48, 39, 57]}
        evaluations[key] = Evaluation(
            nats=draw.uniform(50, 100, 3), **{k: np.array(v) for k, v in counts.items()}
        )
    everything = [*evaluations.items()]
    first = [everything[0]]
    for where, arms, some in (
        (folder, ("kan", "gelu"), everything),
        (folder / "kan" / "seed-0" / "stage-0-words", ("kan",), first),
    ):
        found = dict(some)
        present = [d for d in domains if any(key.domain == d for key in found)]
        results = derive(
            [Record.of(key, evaluation.sums()) for key, evaluation in some],
            {arm: facts | ({"sweep": tried} if len(arms) > 1 else {}) for arm in arms},
            domains=present,
            documents=found,
            references={d: vars(References(3.1, 0.8, 10, 2.5, 20, 30)) for d in present},
            notes=[
                Note(arm=None, domain="words", note="3 rows without a text"),
                Note(arm="kan", domain=None, note="?"),
            ],
            provenance={"commit": None, "dirty": None, "data_hash": dict.fromkeys(present, "ab")},
            resamples=20,
        )
        write_results(where, results, found)
        (where / "config.yaml").write_text(to_yaml(config))
    (folder / "kan" / "seed-0" / "stage-0-words" / "metrics.jsonl").write_bytes(LINES)


def make_model(run: Path, config: Config) -> None:
    """A run's settings and its model, without the seal that would be all that is read."""
    tokenizer = build_tokenizer(config.tokenizer, lambda: iter(()))
    end = end_of_document(tokenizer)
    settings = KanLMConfig.from_settings(config.model, len(tokenizer), eos_token_id=end)
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(config))
    write_model(run, KanLMForCausalLM(settings), tokenizer)
    (run / "model" / "index.json").unlink()


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1).encode()


def main() -> None:
    """Feed so many inputs to the readers in turn; exit with 1 at the first that goes wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="default 100000")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    # Drawing is matplotlib's, and a hundred times slower than all that is read.
    for name in ("learning_curves", "loss_matrices", "forgetting_and_gain"):
        setattr(page.figures, name, lambda study: [])
    page.sweep_figure.sweep_pictures = lambda study: []
    counts: Counter[tuple[str, str]] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        readers = Readers(
            Path(place) / "files" if (Path(place) / "files").mkdir() is None else Path()
        )
        others = [good for goods, _ in readers.kinds.values() for good in goods]
        for number in range(options.inputs):
            name, (goods, read) = list(readers.kinds.items())[number % len(readers.kinds)]
            content = damaged(draw.choice(goods), others, draw)
            started = time.process_time()
            outcome = _outcome(read, content)
            slowest = max(slowest, time.process_time() - started)
            counts[name, outcome] += 1
            if outcome not in ("taken", "refused") or slowest > SLOWEST or _escaped(Path(place)):
                Path("fuzz-input").write_bytes(content)
                sys.exit(f"{name}, input {number} (in fuzz-input), {slowest:.1f} s: {outcome}")
    for (name, outcome), count in sorted(counts.items()):
        print(f"{name}: {count:,} {outcome}")
    print(f"{options.inputs:,} inputs, the slowest took {slowest:.2f} s")


def _outcome(read: Callable[[bytes], object], content: bytes) -> str:
    try:
        read(content)
    except UserError as error:
        # A name that the input chose may itself hold what ends a line.
        return "refused" if str(error).strip() else "an empty message"
    except BaseException:
        return traceback.format_exc()
    return "taken"


def _escaped(place: Path) -> bool:
    return [path.name for path in place.iterdir()] != ["files"] or Path("CANARY").exists()


if __name__ == "__main__":
    main()
