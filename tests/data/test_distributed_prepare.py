"""A source tokenised in parts makes the shards that it makes as a whole."""

import errno
import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kanlm.config import DataSettings
from kanlm.data import batch_encode, preparation
from kanlm.data.distributed_prepare import DOCUMENT, join_parts, write_part
from kanlm.data.preparation import Target, prepare
from kanlm.data.sources import make_source
from kanlm.errors import UserError


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Several of them, and so several shards, in a small text."""
    monkeypatch.setattr(batch_encode, "BATCH_DOCUMENTS", 100)


@pytest.fixture
def several_files(tmp_path, stories, write_jsonl):
    """Seven files of different sizes, one with nothing in it, and blank documents among them."""
    (tmp_path / "set").mkdir()
    for number, count in enumerate([300, 20, 0, 700, 1, 250, 120]):
        texts = [text if i % 50 else " \n" for i, text in enumerate(stories(count, seed=number))]
        write_jsonl(tmp_path / "set" / f"{number}.jsonl", texts)
    return [{"kind": "files", "path": "set/*.jsonl"}]


def make_target(sources, root, cache, tokenizer):
    data = DataSettings(sources=sources, root=str(root), cache_dir=str(root / cache))
    return Target.of(make_source(sources[0], root), tokenizer, data), data


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("count", [1, 3, 20])
def test_joined_parts_are_the_shards_of_the_whole(
    several_files, tmp_path, byte_tokenizer, bpe_tokenizer, count
):
    for tokenizer in (byte_tokenizer, bpe_tokenizer):
        _, data = make_target(several_files, tmp_path, "whole", tokenizer)
        source = make_source(several_files[0], tmp_path)
        whole = prepare(source, tokenizer, data, shard_tokens=9000)
        target, _ = make_target(several_files, tmp_path, f"parts-{count}", tokenizer)
        parts = [write_part(target, index, count) for index in reversed(range(count))]
        sharded = join_parts(target, shard_tokens=9000)
        assert len(sharded.shards("train")) > 2
        assert sharded.manifest == whole.manifest
        assert content(sharded.folder) == content(whole.folder)
        assert sum(part.left_out.empty for part in parts) == whole.manifest.empty_documents == 30
        assert min(part.documents for part in parts) > 0 or count == 20
        assert not list(target.folder.parent.glob("*.parts-of-*"))


@settings(max_examples=15)
@given(
    st.lists(st.lists(st.text("ab é", max_size=30), max_size=8), min_size=1, max_size=6),
    st.integers(1, 5),
    st.integers(20, 200),
)
def test_so_are_they_however_texts_and_parts_fall(
    tmp_path_factory, write_jsonl, byte_tokenizer, files, count, shard_tokens
):
    root = tmp_path_factory.mktemp("set")
    for number, texts in enumerate(files):
        write_jsonl(root / f"{number}.jsonl", texts)
    # Two that are neither blank, for a single document is not divided.
    write_jsonl(root / "last.jsonl", ["the first", "and the second"])
    sources = [{"kind": "files", "path": "*.jsonl"}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_encode, "BATCH_DOCUMENTS", 3)
        source, (target, data) = (
            make_source(sources[0], root),
            make_target(sources, root, "whole", byte_tokenizer),
        )
        whole = prepare(source, byte_tokenizer, data, shard_tokens=shard_tokens)
        target, _ = make_target(sources, root, "parts", byte_tokenizer)
        for index in range(count):
            write_part(target, index, count)
        sharded = join_parts(target, shard_tokens=shard_tokens)
    assert content(sharded.folder) == content(whole.folder)


def test_joining_goes_on_after_its_last_shard(several_files, tmp_path, byte_tokenizer, monkeypatch):
    target, data = make_target(several_files, tmp_path, "cache", byte_tokenizer)
    for index in range(3):
        write_part(target, index, 3)
    visits = []

    def die(name):
        visits.append(name)
        if len(visits) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "fault_point", die)
        with pytest.raises(KeyboardInterrupt):
            join_parts(target, shard_tokens=9000)
    lines = []
    sharded = join_parts(target, shard_tokens=9000, report=lines.append)
    assert "from where it stopped" in lines[0]
    whole = prepare(
        target.source,
        byte_tokenizer,
        DataSettings(**{**vars(data), "cache_dir": str(tmp_path / "whole")}),
        shard_tokens=9000,
    )
    assert content(sharded.folder) == content(whole.folder)


def test_a_part_that_is_done_is_not_done_again(
    several_files, tmp_path, byte_tokenizer, monkeypatch
):
    target, _ = make_target(several_files, tmp_path, "cache", byte_tokenizer)
    first = write_part(target, 1, 3)
    assert first.documents > 0
    monkeypatch.setattr("kanlm.data.distributed_prepare.Encoder", None)
    assert write_part(target, 1, 3) == first


def test_missing_parts_are_said(several_files, tmp_path, byte_tokenizer):
    target, _ = make_target(several_files, tmp_path, "cache", byte_tokenizer)
    with pytest.raises(UserError, match=r"there are no parts of it in .*cache"):
        join_parts(target)
    for index in (0, 3):
        write_part(target, index, 4)
    with pytest.raises(UserError, match=r"2 of 4 parts are missing in .*parts-of-4; tokenise all"):
        join_parts(target)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("suffix", ["tokens", "documents"])
def test_a_damaged_part_is_named_and_made_anew(
    several_files, tmp_path, byte_tokenizer, suffix, damage
):
    target, _ = make_target(several_files, tmp_path, "cache", byte_tokenizer)
    for index in range(2):
        write_part(target, index, 2)
    (summary,) = Path(target.folder.parent).glob("*.parts-of-2/00001.json")
    damage(summary.with_suffix(f".{suffix}"))
    with pytest.raises(UserError, match=r"parts-of-2/00001\.json: damaged, or a file beside it"):
        join_parts(target)
    assert not target.folder.exists()
    summary.unlink()
    write_part(target, 1, 2)
    join_parts(target)


@pytest.mark.parametrize("content", ["{", "[]", '{"documents": "1"}', '{"more": 1}'])
def test_a_damaged_summary_is_named(several_files, tmp_path, byte_tokenizer, content):
    target, _ = make_target(several_files, tmp_path, "cache", byte_tokenizer)
    write_part(target, 0, 1)
    (summary,) = Path(target.folder.parent).glob("*.parts-of-1/00000.json")
    summary.write_text(content)
    for step in (join_parts, lambda target: write_part(target, 0, 1)):
        with pytest.raises(UserError, match=r"parts-of-1/00000\.json: damaged.*; delete it"):
            step(target)


def test_a_part_is_whole_or_not_there(several_files, tmp_path, byte_tokenizer, monkeypatch):
    target, _ = make_target(several_files, tmp_path, "cache", byte_tokenizer)
    made = []

    def run_out(*arguments):
        made.append(arguments)
        if len(made) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return batch_encode.encode_documents(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("kanlm.data.distributed_prepare.encode_documents", run_out)
        with pytest.raises(UserError, match="no space is left on the disk"):
            write_part(target, 0, 1)
    assert not list(target.folder.parent.glob("*.parts-of-1/*"))
    assert write_part(target, 0, 1).documents == 1391 - 30


def test_a_single_document_is_not_divided(tmp_path, byte_tokenizer):
    (tmp_path / "a.txt").write_text("some text\n" * 50)
    sources = [{"kind": "files", "path": "a.txt"}]
    target, _ = make_target(sources, tmp_path, "cache", byte_tokenizer)
    with pytest.raises(UserError, match="source a is a single document, which is not tokenised"):
        write_part(target, 0, 2)


def test_a_row_holds_what_joining_needs(several_files, tmp_path, byte_tokenizer):
    target, _ = make_target(several_files, tmp_path, "cache", byte_tokenizer)
    write_part(target, 0, 1)
    (path,) = target.folder.parent.glob("*.parts-of-1/00000.documents")
    rows = np.fromfile(path, DOCUMENT)
    lines = chain.from_iterable(
        file.read_text().splitlines() for file in sorted((tmp_path / "set").glob("*"))
    )
    texts = [text for line in lines if (text := json.loads(line)["text"]).strip()]
    assert rows["characters"].tolist() == list(map(len, texts))
    assert rows["sizes"].tolist() == [
        [len(text.encode()) + 1, len(text.split()), len(text.encode())] for text in texts
    ]
