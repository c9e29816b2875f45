"""Preparing: resumed after a kill, reused, safe for two processes, refused when damaged."""

import csv
import errno
import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kanlm.checksums import file_sha256
from kanlm.config import DataSettings
from kanlm.data import batch_encode, preparation
from kanlm.data.describe import print_description
from kanlm.data.distributed_prepare import join_parts, write_part
from kanlm.data.preparation import Target, prepare, training_documents
from kanlm.data.shards import tokens_file
from kanlm.data.sources import make_source
from kanlm.data.splits import split_of_digest
from kanlm.data.tokenizer import Encoder
from kanlm.errors import UserError


def split_of(text):
    return split_of_digest(hashlib.sha256(text.encode()).digest(), 0.05, 0.05)


def open_source(data):
    return make_source(data.sources[0], data.root)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Several of them, and so several shards, in a small text."""
    monkeypatch.setattr(batch_encode, "BATCH_DOCUMENTS", 300)


def stream(sharded, split):
    """All tokens of a split in their order."""
    return [token for shard in sharded.shards(split) for token in sharded.tokens(shard).tolist()]


def test_shards_hold_every_document_of_each_split_in_order(
    stories, make_data, bpe_tokenizer, monkeypatch
):
    monkeypatch.setattr(batch_encode, "BATCH_DOCUMENTS", 300)
    texts = stories(3000)
    data = make_data([*texts[:100], " \n", "", *texts[100:]])
    sharded = prepare(open_source(data), bpe_tokenizer, data, shard_tokens=10_000)
    for split in ("train", "validation", "test"):
        mine = [t for t in texts if split_of(t) == split]
        expected = [[*tokens, 280 - 1] for tokens in map(list, Encoder(bpe_tokenizer).encode(mine))]
        assert stream(sharded, split) == list(chain.from_iterable(expected))
        rows = np.concatenate([sharded.documents(shard) for shard in sharded.shards(split)])
        sizes = [
            [len(e), len(t.split()), len(t.encode())] for e, t in zip(expected, mine, strict=True)
        ]
        assert rows.tolist() == sizes
        counts = sharded.manifest.counts[split]
        assert [counts[name] for name in ("tokens", "words", "bytes")] == rows.sum(0).tolist()
        assert counts["documents"] == len(mine)
    assert len(sharded.shards("train")) > 1
    assert sharded.manifest.empty_documents == 2
    assert sharded.manifest.dtype == "uint16"
    assert not sharded.manifest.single_document


def test_a_single_document_is_split_contiguously_without_end_markers(
    stories, tmp_path, make_data, byte_tokenizer
):
    text = "".join(stories(600))
    data = make_data([text], validation_fraction=0.1, test_fraction=0.0)
    sharded = prepare(open_source(data), byte_tokenizer, data, shard_tokens=5000)
    manifest = sharded.manifest
    assert manifest.single_document
    assert manifest.content_hash == hashlib.sha256(text.encode()).hexdigest()
    cut = int(len(text) * 0.9)
    assert stream(sharded, "train") == list(text[:cut].encode())
    assert stream(sharded, "validation") == list(text[cut:].encode())
    assert sharded.shards("test") == []
    assert manifest.counts["train"]["documents"] > 10


def test_a_large_vocabulary_takes_four_bytes_a_token(
    stories, make_data, byte_tokenizer, monkeypatch
):
    data = make_data(stories(30))
    monkeypatch.setattr(type(byte_tokenizer), "get_vocab", lambda self: {"last": 2**16})
    sharded = prepare(open_source(data), byte_tokenizer, data)
    assert sharded.manifest.dtype == "uint32"
    assert sharded.tokens(sharded.shards("train")[0]).dtype == np.uint32


def test_training_documents_are_the_train_split(stories, make_data, byte_tokenizer):
    data = make_data(stories(200))
    sharded = prepare(open_source(data), byte_tokenizer, data)
    texts = list(training_documents(open_source(data), data))
    assert stream(sharded, "train") == [b for t in texts for b in [*t.encode(), 256]]


def test_an_unchanged_source_is_not_tokenised_again(
    stories, make_data, byte_tokenizer, monkeypatch
):
    data = make_data(stories(50))
    first = prepare(open_source(data), byte_tokenizer, data)
    monkeypatch.setattr(preparation, "Encoder", None)
    again = prepare(open_source(data), byte_tokenizer, data)
    assert again.manifest == first.manifest


def test_whatever_changes_makes_another_folder(stories, make_data, byte_tokenizer, bpe_tokenizer):
    data = make_data(stories(50))
    folders = {prepare(open_source(data), byte_tokenizer, data).folder}
    folders.add(prepare(open_source(data), bpe_tokenizer, data).folder)
    other = make_data(stories(50), validation_fraction=0.2)
    folders.add(prepare(open_source(other), byte_tokenizer, other).folder)
    other = make_data(stories(51))
    folders.add(prepare(open_source(other), byte_tokenizer, other).folder)
    assert len(folders) == 4


def damage_flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize("damage", [damage_flip, damage_truncate, Path.unlink])
@pytest.mark.parametrize("name", ["train-00000.tokens.npy", "test-00000.documents.npy"])
def test_a_damaged_shard_is_refused_by_name(stories, make_data, byte_tokenizer, damage, name):
    data = make_data(stories(80))
    folder = prepare(open_source(data), byte_tokenizer, data).folder
    damage(folder / name)
    with pytest.raises(UserError, match=rf"{name}: .*; delete the folder {folder} ") as raised:
        prepare(open_source(data), byte_tokenizer, data)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["../../outside/train-00000", "/tmp/train-00000", "train-0", ""])
@pytest.mark.parametrize("place", ["name", "sha256"])
def test_a_manifest_names_no_file_elsewhere(stories, make_data, byte_tokenizer, place, name):
    data = make_data(stories(80))
    folder = prepare(open_source(data), byte_tokenizer, data).folder
    path = folder / "manifest.json"
    tree = json.loads(path.read_text())
    shard = tree["shards"][0]
    if place == "name":
        shard["name"] = name
    else:
        shard["sha256"] = {f"{name}.tokens.npy": digest for digest in shard["sha256"].values()}
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"manifest\.json: not a manifest of shards"):
        prepare(open_source(data), byte_tokenizer, data)


def test_arrays_that_pickle_would_have_to_read_are_refused(
    stories, make_data, byte_tokenizer, tmp_path
):
    """Also where somebody has made the checksum fit."""

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "canary",))

    data = make_data(stories(80))
    folder = prepare(open_source(data), byte_tokenizer, data).folder
    tree = json.loads((folder / "manifest.json").read_text())
    shard = tree["shards"][0]
    for name in shard["sha256"]:
        np.save(folder / name, np.array([Evil()], dtype=object), allow_pickle=True)
        shard["sha256"][name] = file_sha256(folder / name)
    (folder / "manifest.json").write_text(json.dumps(tree))
    opened = prepare(open_source(data), byte_tokenizer, data)
    for read in (opened.tokens, opened.documents):
        with pytest.raises(UserError, match="not what the manifest says"):
            read(opened.manifest.shards[0])
    assert not (tmp_path / "canary").exists()


def test_a_damaged_progress_is_refused_by_name(stories, make_data, byte_tokenizer):
    data = make_data(stories(80))
    folder = prepare(open_source(data), byte_tokenizer, data).folder
    partial = folder.rename(folder.with_name(folder.name + ".partial"))
    for content in ("{", "[]", '{"single_document": 1}', '{"single_document": false, "x": 1}'):
        (partial / "progress.json").write_text(content)
        with pytest.raises(UserError, match=r"progress\.json: damaged; delete"):
            prepare(open_source(data), byte_tokenizer, data)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer_hash": "other"}, "tokenizer_hash is other, expected"),
        ({"source_hash": "other"}, "source_hash is other, expected"),
        ({"format_version": 0}, "format_version is 0, expected 2"),
        ({"shards": None}, "not a manifest of shards"),
        (None, "not a manifest of shards"),
        ({"dtype": "object"}, "not a manifest of shards"),
        ({"counts": {}}, "not a manifest of shards"),
        ({"more": 1}, "not a manifest of shards"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(stories, make_data, byte_tokenizer, change, said):
    data = make_data(stories(80))
    folder = prepare(open_source(data), byte_tokenizer, data).folder
    path = folder / "manifest.json"
    tree = json.loads(path.read_text())
    path.write_text("{" if change is None else json.dumps({**tree, **change}))
    with pytest.raises(UserError, match=rf"manifest.json: {said}.*; delete the folder"):
        prepare(open_source(data), byte_tokenizer, data)


@pytest.mark.parametrize("texts", [[], ["", "  \n"]])
def test_an_empty_corpus_is_refused_and_leaves_no_shards(make_data, byte_tokenizer, texts):
    data = make_data(texts)
    with pytest.raises(UserError, match=r"source part0 holds no text: part0\.jsonl"):
        prepare(open_source(data), byte_tokenizer, data)
    assert not list(Path(data.cache_dir).glob("part0-*[0-9a-f]"))


def test_a_full_disk_is_said_and_the_work_so_far_goes_on(
    stories, make_data, byte_tokenizer, monkeypatch
):
    data = make_data(stories(3000))
    save = np.save
    written = []

    def fill_up(file, arr, **options):
        if len(written) == 8:
            file.write(b"some of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(len(arr))
        save(file, arr, **options)

    monkeypatch.setattr(np, "save", fill_up)
    with pytest.raises(UserError, match="no space is left on the disk; what is"):
        prepare(open_source(data), byte_tokenizer, data, shard_tokens=1000)
    assert not list(Path(data.cache_dir).rglob("*.partial/.*"))
    monkeypatch.setattr(np, "save", save)
    lines = []
    prepare(open_source(data), byte_tokenizer, data, shard_tokens=1000, report=lines.append)
    assert "from where it stopped" in lines[0]


def test_a_cache_folder_that_cannot_be_made_is_named(stories, make_data, byte_tokenizer, tmp_path):
    data = make_data(stories(10))
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"data\.cache_dir = .*cache cannot be written"):
        prepare(open_source(data), byte_tokenizer, data)


def test_a_tokenizer_that_loses_text_is_noted(stories, make_data, byte_tokenizer):
    data = make_data(stories(50))
    assert prepare(open_source(data), byte_tokenizer, data).manifest.notes == []
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "</s>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    lossy = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    (note,) = prepare(open_source(data), lossy, data).manifest.notes
    assert "does not spell 32 of the first 32 documents exactly" in note


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "hub"])
def test_rows_without_text_are_left_out_and_counted(
    stories, byte_tokenizer, tmp_path, kind, monkeypatch, capsys
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    rows = [{"n": n, "text": text} for n, text in enumerate(stories(60))]
    rows[3]["text"] = rows[7]["text"] = rows[59]["text"] = None
    rows[5]["text"] = "  "
    path = tmp_path / f"rows.{'jsonl' if kind == 'hub' else kind}"
    if kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["n", "text"])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        del rows[7]["text"]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {"kind": "files", "path": str(path)}
    if kind == "hub":
        spec = {"kind": "hub", "name": "json", "data_files": str(path)}
    data = DataSettings(sources=[spec], cache_dir=str(tmp_path / "cache"))
    lines = []
    manifest = prepare(open_source(data), byte_tokenizer, data, report=lines.append).manifest
    assert (manifest.missing_documents, manifest.empty_documents) == (3, 1)
    assert sum(count["documents"] for count in manifest.counts.values()) == 56
    assert any(line.endswith(": 3 rows without text left out") for line in lines)
    target = Target.of(open_source(data), byte_tokenizer, data)
    shutil.rmtree(target.folder)
    for index in range(2):
        write_part(target, index, 2)
    assert join_parts(target).manifest == manifest
    print_description(data, byte_tokenizer)
    assert ", 1 documents of white space, 3 rows without text" in capsys.readouterr().out


@pytest.mark.parametrize("texts", [[], [" ", "\n"], [None, " "]])
def test_a_source_without_text_leaves_no_folder_behind(make_data, byte_tokenizer, texts):
    data = make_data(texts)
    with pytest.raises(UserError, match="holds no text") as caught:
        prepare(open_source(data), byte_tokenizer, data)
    assert ("1 rows without text left out" in str(caught.value)) == (None in texts)
    assert not [path for path in Path(data.cache_dir).iterdir() if path.is_dir()]


def test_a_long_preparation_says_how_far_it_is(stories, make_data, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(preparation, "TELL_EVERY", -1.0)
    data, lines = make_data(stories(1000)), []
    prepare(open_source(data), byte_tokenizer, data, report=lines.append)
    told = [line for line in lines if line.endswith(" tokens read")]
    counts = [int(line.split()[1].replace(",", "")) for line in told]
    assert len(counts) > 2
    assert counts == sorted(counts)


# Processes

PROGRAM = """
import json, sys, time
from kanlm.config import DataSettings, TokenizerSettings
from kanlm.data import batch_encode, preparation
from kanlm.data.sources import make_source
from kanlm.data.tokenizer import build_tokenizer
data = DataSettings(**json.loads(sys.argv[1]))
batch_encode.BATCH_DOCUMENTS = 100
tokenizer = build_tokenizer(TokenizerSettings(kind="bytes"), lambda: iter(()))
def report(line):
    print(line, flush=True)
    time.sleep(float(sys.argv[2]))
source = make_source(data.sources[0], data.root)
preparation.prepare(source, tokenizer, data, shard_tokens=5000, report=report)
print("done", flush=True)
"""


def start(data, pause):
    tree = {"sources": data.sources, "root": data.root, "cache_dir": data.cache_dir}
    arguments = [sys.executable, "-c", PROGRAM, json.dumps(tree), str(pause)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)


def read_line(process):
    line = process.stdout.readline()
    assert line, "the process has ended"
    return line


def output(process):
    assert process.wait(timeout=120) == 0
    return process.stdout.read().splitlines()


@pytest.mark.parametrize("kind", ["files", "hub"])
def test_a_killed_preparation_goes_on_where_it_was(
    stories, write_jsonl, make_data, tmp_path, byte_tokenizer, kind, monkeypatch
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    texts = stories(3000)
    data = make_data(texts)
    if kind == "hub":
        for part in range(3):
            (tmp_path / "set").mkdir(exist_ok=True)
            write_jsonl(tmp_path / "set" / f"train-{part}.jsonl", texts[part * 1000 :][:1000])
        data.sources[:] = [{"kind": "hub", "name": "set", "streaming": True}]
    process = start(data, pause=0.2)
    tokens_before = 0
    while tokens_before < 30_000:
        line = read_line(process)
        if "tokens so far" in line:
            tokens_before = int(line.split()[0].replace(",", ""))
    process.send_signal(signal.SIGKILL)
    process.wait()
    (partial,) = Path(data.cache_dir).glob("*.partial")
    kept = {path.name: path.read_bytes() for path in partial.glob("*.npy")}
    assert kept

    lines = output(start(data, pause=0))
    assert f"from where it stopped, after {tokens_before:,} tokens" in lines[0]
    assert not partial.exists()
    # The same as without interruption, and the shards from before were not made again.
    resumed = prepare(open_source(data), byte_tokenizer, data)
    data.__dict__["cache_dir"] = str(tmp_path / "other")
    monkeypatch.setattr(batch_encode, "BATCH_DOCUMENTS", 100)
    whole = prepare(open_source(data), byte_tokenizer, data, shard_tokens=5000)
    assert resumed.manifest == whole.manifest
    for name, content in kept.items():
        assert (resumed.folder / name).read_bytes() == content
    assert (resumed.folder / tokens_file("train-00000")).exists()


KILLED = """
import datasets, json, os, sys
from glob import glob
from kanlm.config import DataSettings, TokenizerSettings
from kanlm.data import batch_encode, preparation
from kanlm.data.sources import make_source
from kanlm.data.tokenizer import build_tokenizer
data = DataSettings(**json.loads(sys.argv[1]))
batch_encode.BATCH_DOCUMENTS = 100
tokenizer = build_tokenizer(TokenizerSettings(kind="bytes"), lambda: iter(()))
for fault in ("inside-preparation:3", "inside-preparation:1", ""):
    # A copy of this process, which has started no threads yet: importing takes seconds.
    pid = os.fork()
    if not pid:
        if fault:
            os.environ["KANLM_FAULT"] = fault
        source = make_source(data.sources[0], data.root)
        preparation.prepare(source, tokenizer, data, shard_tokens=5000)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (-9 if fault else 0), fault
    if fault:
        (progress,) = map(json.load, map(open, glob(f"{data.cache_dir}/*.partial/progress.json")))
        print(progress["rounds"], json.dumps(progress["cursor"]), flush=True)
"""


def many_files(folder, texts):
    """Files of each kind, a tenth of the texts in each, in the order of their names."""
    parts = [texts[start::10] for start in range(10)]
    texts[:] = list(chain.from_iterable(parts))
    for number, part in enumerate(parts):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part).encode()
        name = folder / f"{number}.jsonl"
        if number % 5 == 0:
            name.write_bytes(lines)
        elif number % 5 == 1:
            name.with_suffix(".jsonl.gz").write_bytes(gzip.compress(lines))
        elif number % 5 == 2:
            with pyarrow.output_stream(name.with_suffix(".jsonl.zst"), compression="zstd") as file:
                file.write(lines)
        elif number % 5 == 3:
            name.with_suffix(".txt").write_text("%%".join(part))
        else:
            parquet.write_table(pyarrow.table({"text": part}), name.with_suffix(".parquet"))
    return {"kind": "files", "path": "set/*", "separator": "%%"}


def parquet_files(folder, texts):
    for start in range(0, 3000, 1000):
        table = pyarrow.table({"text": texts[start : start + 1000]})
        parquet.write_table(table, folder / f"train-{start}.parquet", row_group_size=300)
    return {"kind": "hub", "name": "set"}


@pytest.mark.parametrize("write", [many_files, parquet_files])
def test_kills_between_shards_and_progress_leave_no_trace(
    stories, tmp_path, byte_tokenizer, write, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    texts = stories(3000)
    (tmp_path / "set").mkdir()
    spec = write(tmp_path / "set", texts)
    tree = {"sources": [spec], "root": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(tree)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # Each start goes on behind the last round that was noted, the first with nothing.
    assert [int(line.split()[0]) for line in done.stdout.splitlines()] == [2, 2]
    (killed,) = (tmp_path / "cache").glob("*[0-9a-f]")
    monkeypatch.setattr(batch_encode, "BATCH_DOCUMENTS", 100)
    data = DataSettings(sources=[spec], root=str(tmp_path), cache_dir=str(tmp_path / "whole"))
    whole = prepare(open_source(data), byte_tokenizer, data, shard_tokens=5000)
    assert sum(counts["documents"] for counts in whole.manifest.counts.values()) == 3000
    expected = {path.name: path.read_bytes() for path in whole.folder.iterdir()}
    assert {path.name: path.read_bytes() for path in killed.iterdir()} == expected


def test_two_processes_prepare_the_same_thing_once(stories, make_data, byte_tokenizer):
    data = make_data(stories(1500))
    first = start(data, pause=0.3)
    assert "preparing" in read_line(first)
    began = time.monotonic()
    second = start(data, pause=0.3)
    lines = output(second)
    assert lines == ["done"]
    assert "done" in output(first)
    assert time.monotonic() - began < 100
    sharded = prepare(open_source(data), byte_tokenizer, data)
    assert sum(c["documents"] for c in sharded.manifest.counts.values()) == 1500
