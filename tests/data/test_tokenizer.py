"""Tokenizers: lossless, deterministic, and the same after saving and loading."""

import json
import re
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import kanlm.data.tokenizer
from kanlm.config import TokenizerSettings
from kanlm.data.corpus import open_corpus
from kanlm.data.describe import describe
from kanlm.data.tokenizer import (
    END_OF_DOCUMENT,
    Encoder,
    build_tokenizer,
    decode,
    end_of_document,
    tokenizer_hash,
    vocabulary_size,
)
from kanlm.errors import UserError
from kanlm.evaluation.references import bigram_bits_per_byte

TEXTS = ["the cat sat on the mat\n", "the dog, né Rex, ate the cat food\n"] * 20


def build(kind):
    vocab_size = 280 if kind == "bpe" else None
    return build_tokenizer(TokenizerSettings(kind=kind, vocab_size=vocab_size), lambda: iter(TEXTS))


TOKENIZERS = {kind: build(kind) for kind in ("bytes", "characters", "bpe")}
ENCODERS = {kind: Encoder(tokenizer) for kind, tokenizer in TOKENIZERS.items()}


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text() | st.text("the <|endoftext|>né0xA\n"))
def test_any_text_is_spelt_exactly(kind, text):
    tokenizer = TOKENIZERS[kind]
    (tokens,) = ENCODERS[kind].encode([text])
    assert decode(tokenizer, tokens) == text
    assert end_of_document(tokenizer) not in tokens


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_literal_marker_is_ordinary_text(kind):
    tokenizer = TOKENIZERS[kind]
    text = f"the{END_OF_DOCUMENT}cat"
    (tokens,) = ENCODERS[kind].encode([text])
    assert end_of_document(tokenizer) not in tokens
    assert tokenizer(text)["input_ids"] == tokens.tolist()
    assert decode(tokenizer, tokens) == text


@given(text=st.text())
def test_byte_tokens_are_the_bytes(text):
    (tokens,) = ENCODERS["bytes"].encode([text])
    assert tokens.tolist() == list(text.encode())
    assert end_of_document(TOKENIZERS["bytes"]) == 256


def test_characters_are_tokens_and_unseen_ones_their_bytes():
    tokenizer = TOKENIZERS["characters"]
    seen = sorted(set("".join(TEXTS)))
    assert len(tokenizer) == len(seen) + 256 + 1
    (tokens,) = Encoder(tokenizer).encode(["cat é"])
    assert tokens.tolist() == [seen.index(letter) for letter in "cat é"]
    (tokens,) = Encoder(tokenizer).encode(["ü"])
    assert tokens.tolist() == [len(seen) + byte for byte in "ü".encode()]


def test_bpe_has_the_stated_size_and_shortens_text():
    tokenizer = TOKENIZERS["bpe"]
    assert len(tokenizer) == 280
    (tokens,) = Encoder(tokenizer).encode([TEXTS[0]])
    assert len(tokens) < 0.7 * len(TEXTS[0])


def test_training_a_bpe_again_in_another_process_gives_the_same():
    code = (
        "from kanlm.config import TokenizerSettings as S;"
        "from kanlm.data.tokenizer import build_tokenizer, tokenizer_hash;"
        f"texts = {TEXTS!r};"
        "t = build_tokenizer(S(kind='bpe', vocab_size=280), lambda: iter(texts));"
        "print(tokenizer_hash(t))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == tokenizer_hash(TOKENIZERS["bpe"])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_saving_and_loading_keeps_the_hash_and_the_tokens(kind, tmp_path):
    tokenizer = TOKENIZERS[kind]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
    text = f"the cat {END_OF_DOCUMENT} ü"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.eos_token_id == tokenizer.eos_token_id


def test_the_hash_tells_tokenizers_apart_and_ignores_padding():
    hashes = {tokenizer_hash(tokenizer) for tokenizer in TOKENIZERS.values()}
    assert len(hashes) == 3
    tokenizer = build("bpe")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["the", "the cat"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(tokenizer) == tokenizer_hash(TOKENIZERS["bpe"])


def test_a_pretrained_tokenizer_is_taken_as_it_is(tmp_path):
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "</s>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path)
    settings = TokenizerSettings(kind="pretrained", name=str(tmp_path))
    tokenizer = build_tokenizer(settings, lambda: iter(()))
    assert end_of_document(tokenizer) == 2
    np.testing.assert_array_equal(Encoder(tokenizer).encode(["the"])[0], [1])


def test_a_pretrained_tokenizer_without_an_end_is_refused(tmp_path):
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no eos token"):
        build_tokenizer(TokenizerSettings(kind="pretrained", name=str(tmp_path)), lambda: iter(()))


def test_a_pretrained_tokenizer_that_is_not_there_is_named(tmp_path):
    settings = TokenizerSettings(kind="pretrained", name=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"tokenizer\.name = '.*none': cannot be loaded") as raised:
        build_tokenizer(settings, lambda: iter(()))
    assert "\n" not in str(raised.value)


# In pieces


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text("the cat,né. \n\t'9") | st.text())
def test_a_long_text_has_the_tokens_of_the_library(kind, text):
    """Unless it is one long word, which is cut where nothing else will do."""
    text = re.sub(r"(\S{20})(?=\S)", r"\1 ", text)
    encoder = ENCODERS[kind]
    assert encoder.cuts
    with mock.patch.object(kanlm.data.tokenizer, "PIECE_CHARACTERS", 50):
        (tokens,) = encoder.encode([text])
    assert tokens.tolist() == encoder.backend.encode(text, add_special_tokens=False).ids


def test_texts_come_back_apart_however_they_are_batched(monkeypatch):
    monkeypatch.setattr(kanlm.data.tokenizer, "PIECE_CHARACTERS", 30)
    monkeypatch.setattr(kanlm.data.tokenizer, "BATCH_CHARACTERS", 100)
    texts = ["the cat " * count for count in (0, 1, 50, 2, 0, 9, 30, 0)]
    encoder = ENCODERS["bytes"]
    assert [bytes(tokens.tolist()).decode() for tokens in encoder.encode(texts)] == texts
    tokens, lengths = encoder.encode_end_to_end(texts, [256])
    assert tokens.tolist() == [b for text in texts for b in [*text.encode(), 256]]
    assert lengths.tolist() == [len(text) + 1 for text in texts]


def with_parts(normalizer=None, pre_tokenizer=None, model=None, token=None):
    backend = Tokenizer(model or models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    if normalizer:
        backend.normalizer = normalizer
    if pre_tokenizer:
        backend.pre_tokenizer = pre_tokenizer
    if token:
        backend.add_tokens([token])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    ("parts", "cuts"),
    [
        ({"pre_tokenizer": LEVEL}, True),
        ({"model": models.BPE({"a": 0}, [])}, True),
        ({}, False),
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, False),
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(False, use_regex=False)}, False),
        ({"pre_tokenizer": pre_tokenizers.Metaspace()}, False),
        ({"pre_tokenizer": LEVEL, "normalizer": normalizers.NFC()}, False),
        ({"pre_tokenizer": LEVEL, "token": " b\n"}, False),
        ({"pre_tokenizer": LEVEL, "model": models.WordLevel({"a": 0}, "a")}, False),
    ],
    ids=range(9),
)
def test_only_where_words_begin_at_spaces_is_a_text_cut(parts, cuts):
    assert Encoder(with_parts(**parts)).cuts == cuts


def test_truncation_of_the_tokenizer_is_not_the_encoder_s():
    tokenizer = build("bytes")
    tokenizer("a b c", truncation=True, max_length=2)
    assert tokenizer.backend_tokenizer.truncation is not None
    assert len(Encoder(tokenizer).encode(["a b c"])[0]) == 5


@pytest.mark.parametrize("largest", [300, 2**16 - 1, 2**16, 2**16 + 90])
def test_tokens_with_holes_between_are_what_was_encoded(tmp_path, make_data, largest):
    """A vocabulary that was pruned, or has its special tokens far from the others."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)} | {"a": largest - 1}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    state = json.loads(backend.to_str())
    state["added_tokens"][0]["id"] = largest
    state["model"]["vocab"]["</s>"] = largest
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>"
    ).save_pretrained(tmp_path / "tokenizer")
    settings = TokenizerSettings(kind="pretrained", name=str(tmp_path / "tokenizer"))
    tokenizer = build_tokenizer(settings, lambda: iter(()))
    assert len(tokenizer) < vocabulary_size(tokenizer) == largest + 1
    texts = [f"a banana and a cat {number}" for number in range(200)]
    data = make_data(texts, near_duplicate_threshold=None)
    corpus = open_corpus(data, tokenizer)
    assert corpus.sources[0].sharded.manifest.dtype == ("uint16" if largest < 2**16 else "uint32")
    train = corpus.split("train")
    assert train.text(0).startswith("a banana and a cat")
    assert train.tokens(0, train.n_tokens).max() == largest == end_of_document(tokenizer)
    assert describe(data, tokenizer)["vocab_size"] == largest + 1
    # The bigram's pairs are numbered by the size of the vocabulary.
    assert 0 < bigram_bits_per_byte(corpus, "test")[0] < 8


def test_a_vocabulary_that_the_text_does_not_give_is_refused():
    settings = TokenizerSettings(kind="bpe", vocab_size=1_000_000)
    with pytest.raises(UserError, match=r"vocab_size = 1000000: .* more than (\d+) tokens") as said:
        build_tokenizer(settings, lambda: iter(TEXTS))
    reached = int(re.findall(r"more than (\d+)", str(said.value))[0])
    settings = TokenizerSettings(kind="bpe", vocab_size=reached)
    assert vocabulary_size(build_tokenizer(settings, lambda: iter(TEXTS))) == reached
