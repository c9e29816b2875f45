"""A domain: mixed sources, dropped near-duplicates, streams and texts."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kanlm.config import DataSettings, TokenizerSettings
from kanlm.data.corpus import (
    Split,
    check_few_documents,
    open_corpus,
    open_sources,
    open_tokenizer,
)
from kanlm.data.splits import split_of_digest
from kanlm.data.tokenizer import build_tokenizer, tokenizer_hash
from kanlm.errors import UserError


def split_of(text, validation=0.05, test=0.05):
    return split_of_digest(hashlib.sha256(text.encode()).digest(), validation, test)


def make_split(documents, kept, cuts, tokenizer):
    """Lay documents of tokens into shards that are cut at `cuts`."""
    parts = np.split(np.arange(len(documents)), sorted({c % (len(documents) + 1) for c in cuts}))
    arrays = [np.array([t for i in part for t in documents[i]], dtype=np.uint16) for part in parts]
    sizes = [
        np.array([[len(documents[i]), i, 2 * i] for i in part], dtype=np.int64).reshape(-1, 3)
        for part in parts
    ]
    return Split("train", tokenizer, arrays, sizes, [np.array(kept)[part] for part in parts])


@given(st.data())
def test_a_stream_is_its_kept_documents_end_to_end(byte_tokenizer, data):
    documents = data.draw(st.lists(st.lists(st.integers(0, 255), min_size=1), min_size=1))
    kept = data.draw(st.lists(st.booleans(), min_size=len(documents), max_size=len(documents)))
    cuts = data.draw(st.lists(st.integers(0, 30), max_size=3))
    split = make_split(documents, kept, cuts, byte_tokenizer)
    chosen = [i for i, keep in enumerate(kept) if keep]
    whole = [token for i in chosen for token in documents[i]]
    assert split.n_tokens == len(whole)
    assert split.document_words.tolist() == chosen
    assert split.document_bytes.tolist() == [2 * i for i in chosen]
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    found = split.tokens(start, stop)
    assert found.dtype == np.int64
    assert found.tolist() == whole[start:stop]
    laid = [tokens.tokens.tolist() for tokens in split.token_documents(0)]
    assert [token for tokens in laid for token in tokens] == whole
    lengths = [n for tokens in split.token_documents(0) for n in tokens.lengths.tolist()]
    assert lengths == [len(documents[i]) for i in chosen]


def test_tokens_outside_the_stream_are_refused(byte_tokenizer):
    split = make_split([[1, 2, 3]], [True], [], byte_tokenizer)
    for start, stop in ((-1, 2), (0, 4), (2, 1)):
        with pytest.raises(IndexError):
            split.tokens(start, stop)


def test_sources_are_joined_and_documents_read_back(make_data, bpe_tokenizer, stories):
    parts = stories(120), stories(150, seed=1)
    corpus = open_corpus(make_data(*parts, near_duplicate_threshold=None), bpe_tokenizer)
    for name in ("train", "validation", "test"):
        split = corpus.split(name)
        texts = [text for part in parts for text in part if split_of(text) == name]
        assert list(split.texts()) == texts
        assert split.document_words.tolist() == [len(text.split()) for text in texts]
        assert split.document_bytes.tolist() == [len(text.encode()) for text in texts]
        assert split.n_tokens == split.document_tokens.sum()
        assert (split.tokens(0, split.n_tokens) == 279).sum() == split.n_documents == len(texts)


def test_adding_a_file_moves_no_document(make_data, byte_tokenizer, stories):
    few, more = stories(100), stories(100, seed=1)
    before = open_corpus(make_data(few), byte_tokenizer)
    after = open_corpus(make_data(few, more), byte_tokenizer)
    for name in ("validation", "test"):
        assert set(before.split(name).texts()) <= set(after.split(name).texts())


def test_near_duplicates_of_any_source_s_held_out_documents_leave_training(
    make_data, byte_tokenizer, stories
):
    originals = stories(200)
    held_out = [text for text in originals if split_of(text) != "train"]
    copies = [text + "!" for text in held_out]
    trained_copies = [text for text in copies if split_of(text) == "train" and len(text) > 60]
    other = stories(100, seed=1)
    data = make_data(originals, [*other, *trained_copies], near_duplicate_threshold=0.8)
    lines = []
    corpus = open_corpus(data, byte_tokenizer, report=lines.append)
    trained = set(corpus.split("train").texts())
    assert len(trained_copies) > 10
    assert not trained & set(trained_copies)
    assert [entry.near_duplicates for entry in corpus.sources] == [0, len(trained_copies)]
    said = "training documents dropped as near-duplicates of held-out ones"
    label = corpus.sources[1].source.label
    assert corpus.notes == [f"{label}: {said}: {len(trained_copies)}"]
    assert any(f"dropped {len(trained_copies)} near-duplicates" in line for line in lines)
    assert "text: looking for near-duplicates of held-out documents" in lines
    assert {text for text in other if split_of(text) == "train"} <= trained
    # Recalled from the cache the second time.
    again = open_corpus(data, byte_tokenizer)
    assert set(again.split("train").texts()) == trained
    (remembered,) = (
        remembered for remembered in Path(data.cache_dir).glob("near-duplicates-*.npz")
    )
    remembered.write_bytes(b"x")
    with pytest.raises(UserError, match=r"near-duplicates-.*\.npz: damaged; delete it"):
        open_corpus(data, byte_tokenizer)


def test_rows_without_text_and_white_space_are_notes_of_the_corpus(
    tmp_path, byte_tokenizer, stories
):
    rows = [{"text": text} for text in stories(120)] + [{"text": None}] * 3 + [{"text": " \n"}] * 2
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSettings(
        domain="rows",
        sources=[{"kind": "files", "path": str(path)}],
        cache_dir=str(tmp_path / "cache"),
        near_duplicate_threshold=None,
    )
    notes = open_corpus(data, byte_tokenizer).notes
    assert notes[:2] == ["documents of white space left out: 2", "rows without text left out: 3"]


def test_a_single_document_stays_whole(make_data, byte_tokenizer):
    text = "to be or not to be, that is the question\n" * 400
    data = make_data([text], validation_fraction=0.1, test_fraction=0.0)
    corpus = open_corpus(data, byte_tokenizer)
    assert "".join(corpus.split("train").texts()) == text[: int(0.9 * len(text))]
    assert "".join(corpus.split("validation").texts()) == text[int(0.9 * len(text)) :]
    assert corpus.split("train").n_tokens == int(0.9 * len(text))
    with pytest.raises(UserError, match=r"no document falls into test with data.test_fraction = 0"):
        corpus.split("test")


def test_an_empty_split_names_the_fraction_to_raise(make_data, byte_tokenizer):
    texts = [t for t in (f"text {i}" for i in range(100)) if split_of(t) == "train"][:3]
    corpus = open_corpus(make_data(texts), byte_tokenizer)
    with pytest.raises(UserError, match=r"data\.validation_fraction = 0\.05; raise it"):
        corpus.split("validation")
    texts = [t for t in (f"text {i}" for i in range(100)) if split_of(t) == "test"][:3]
    corpus = open_corpus(make_data(texts), byte_tokenizer)
    with pytest.raises(UserError, match="no document is left to train on"):
        corpus.split("train")


def test_the_fingerprint_follows_text_weights_and_rules_but_not_the_tokenizer(
    make_data, byte_tokenizer, bpe_tokenizer, stories
):
    texts = stories(60)
    first = open_corpus(make_data(texts), byte_tokenizer).fingerprint
    assert open_corpus(make_data(texts), bpe_tokenizer).fingerprint == first
    found = {first, open_corpus(make_data(stories(60, seed=1)), byte_tokenizer).fingerprint}
    changed = {0: 1.0, 9: 2.0}
    assert open_corpus(make_data(texts, weights=[{0: 1.0}]), byte_tokenizer).fingerprint == first
    found.add(open_corpus(make_data(texts, weights=[changed]), byte_tokenizer).fingerprint)
    for change in ({"weights": [2.0]}, {"near_duplicate_threshold": 0.5}, {"test_fraction": 0.1}):
        found.add(open_corpus(make_data(texts, **change), byte_tokenizer).fingerprint)
    assert len(found) == 6


@pytest.mark.parametrize("kind", ["characters", "bpe"])
def test_a_vocabulary_is_learned_from_training_text_alone_and_kept(make_data, kind, stories):
    texts = [text if split_of(text) == "train" else text + "æ" for text in stories(300)]
    texts = [text for text in texts if "æ" not in text or split_of(text) != "train"]
    data = make_data(texts)
    settings = TokenizerSettings(kind=kind, vocab_size=300 if kind == "bpe" else None)
    tokenizer = open_tokenizer(settings, data)
    of_training = build_tokenizer(settings, lambda: (t for t in texts if split_of(t) == "train"))
    of_all = build_tokenizer(settings, lambda: iter(texts))
    assert tokenizer_hash(tokenizer) == tokenizer_hash(of_training) != tokenizer_hash(of_all)
    lines = []
    again = open_tokenizer(settings, data, report=lines.append)
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer)
    assert lines == []
    (kept,) = Path(data.cache_dir).glob(f"tokenizer-{kind}-*.json")
    kept.write_text("{")
    with pytest.raises(UserError, match=r"tokenizer-.*\.json: damaged; delete it"):
        open_tokenizer(settings, data)


def test_the_content_hash_of_a_single_document_is_the_file_s(tmp_path, byte_tokenizer):
    (tmp_path / "a.txt").write_text("some text\n" * 50)
    data = DataSettings(
        sources=[{"kind": "files", "path": "a.txt"}], root=str(tmp_path), cache_dir=str(tmp_path)
    )
    corpus = open_corpus(data, byte_tokenizer)
    expected = hashlib.sha256((tmp_path / "a.txt").read_bytes()).hexdigest()
    assert corpus.sources[0].sharded.manifest.content_hash == expected


def test_few_documents_are_looked_at_before_they_are_prepared(make_data, stories, monkeypatch):
    few = stories(5)
    data = make_data(few, validation_fraction=0.01, test_fraction=0.01)
    for split in ("validation", "test"):
        with pytest.raises(UserError, match=rf"into {split} with .*0\.01; .* separator out: one"):
            check_few_documents(data, (split,))
    assert not Path(data.cache_dir).exists()
    check_few_documents(data, ())
    # As many as may have some, and so much text that a look at all of it would take long.
    monkeypatch.setattr("kanlm.data.corpus.FEW_DOCUMENTS", 4)
    check_few_documents(data, ("validation",))
    monkeypatch.setattr("kanlm.data.corpus.FEW_DOCUMENTS", 64)
    monkeypatch.setattr("kanlm.data.corpus.FEW_CHARACTERS", 100)
    check_few_documents(data, ("validation",))
    # One alone is cut in its order.
    check_few_documents(make_data(few[:1]), ("validation", "test"))


def test_a_file_in_two_sources_is_refused(make_data, stories, byte_tokenizer):
    data = make_data(stories(50), stories(50, seed=1))
    twice = [*data.sources, {"kind": "files", "path": ["part*.jsonl"]}]
    with pytest.raises(UserError, match=r"sources 0 and 2 both read .*part0\.jsonl"):
        open_corpus(replace(data, sources=twice), byte_tokenizer)
    other_column = [data.sources[0], {**data.sources[0], "column": "title"}]
    assert len(open_sources(replace(data, sources=other_column))) == 2


def test_a_vocabulary_is_learned_from_some_text(make_data, stories):
    settings = TokenizerSettings(kind="bpe", vocab_size=300)
    with pytest.raises(UserError, match="no document to learn a vocabulary from in part0"):
        open_tokenizer(settings, make_data(["", "  \n"]))
