"""The description of a domain against counts made by hand."""

import hashlib
import json
import re

import pytest

from kanlm.data.corpus import open_corpus
from kanlm.data.describe import describe, print_description
from kanlm.data.splits import split_of_digest
from kanlm.errors import UserError


def split_of(text):
    return split_of_digest(hashlib.sha256(text.encode()).digest(), 0.05, 0.05)


def shingle_set(texts):
    tokens = [list(text.encode()) for text in texts]
    return {tuple(t[i : i + 8]) for t in tokens for i in range(max(len(t) - 7, 0))}


def test_counts_and_overlap_are_those_of_the_text(make_data, byte_tokenizer, stories):
    parts = [*stories(80), "", "\n"], [text.upper() for text in stories(70, seed=1)]
    weights = [{0: 1, 500: 0.25}, 3]
    data = make_data(*parts, weights=weights, near_duplicate_threshold=None)
    found = json.loads(json.dumps(describe(data, byte_tokenizer)))
    by_split = {"train": [], "validation": [], "test": []}
    for part, source in zip(parts, found["sources"], strict=True):
        texts = [text for text in part if text.strip()]
        for name, sizes in source["splits"].items():
            mine = [t for t in texts if split_of(t) == name]
            by_split[name] += mine
            size = sum(len(text.encode()) for text in mine)
            assert sizes == {
                "documents": len(mine),
                "bytes": size,
                "words": sum(len(text.split()) for text in mine),
                "tokens": size + len(mine),
                "bytes_per_token": size / (size + len(mine)),
            }
    assert [source["empty_documents"] for source in found["sources"]] == [2, 0]
    weights = [source["weights"] for source in found["sources"]]
    assert weights == [{"0": 1.0, "500": 0.25}, {"0": 3.0}]
    sets = {name: shingle_set(texts) for name, texts in by_split.items()}
    for name in ("validation", "test"):
        share = len(sets[name] & sets["train"]) / len(sets[name])
        assert found["overlap"][f"{name} in train"] == pytest.approx(share)
    first, second = (shingle_set([t for t in part if t.strip()]) for part in parts)
    share = len(first & second) / len(first)
    assert found["overlap"]["part0 (1) in part1 (2)"] == pytest.approx(share)
    assert found["sample"] in "".join(by_split["train"])
    assert found["fingerprint"] == open_corpus(data, byte_tokenizer).fingerprint


def test_what_is_printed_names_sources_splits_and_special_cases(
    make_data, byte_tokenizer, stories, capsys
):
    text = "".join(stories(300))
    data = make_data([text], validation_fraction=0.1, test_fraction=0.0, domain="tales")
    print_description(data, byte_tokenizer)
    printed = capsys.readouterr().out
    assert "domain tales" in printed
    assert "weight 1\n" in printed
    assert "one document: split contiguously in the order of its text" in printed
    assert "validation in train" in printed
    assert f"{len(text[: int(len(text) * 0.9)].encode()):,}" in printed


def test_weights_that_change_are_printed(make_data, byte_tokenizer, stories, capsys):
    data = make_data(stories(60), stories(60, seed=1), weights=[{0: 1, 500: 0.25}, 3])
    print_description(data, byte_tokenizer)
    printed = capsys.readouterr().out
    assert "part0.jsonl (1 file, column text), weight 1, 0.25 from update 500 on\n" in printed
    assert "part1.jsonl (1 file, column text), weight 3\n" in printed


def test_a_held_out_split_without_documents_is_warned_of(
    make_data, byte_tokenizer, stories, capsys
):
    data = make_data(stories(30), test_fraction=0.0)
    (problem,) = describe(data, byte_tokenizer)["problems"]
    print_description(data, byte_tokenizer)
    assert f"warning: {problem}" in capsys.readouterr().out
    assert "data.test_fraction = 0" in problem
    with pytest.raises(UserError, match=re.escape(problem)):
        open_corpus(data, byte_tokenizer).split("test")
    assert describe(make_data(stories(80)), byte_tokenizer)["problems"] == []
