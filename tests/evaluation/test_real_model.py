"""Evaluation and references over the package's own model and corpora."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kanlm.config import DataSettings, TokenizerSettings
from kanlm.data.corpus import Corpus, open_corpus, open_tokenizer
from kanlm.data.tokenizer import end_of_document
from kanlm.evaluation import references as module
from kanlm.evaluation.perplexity import evaluate
from kanlm.evaluation.references import cached_references, references
from kanlm.model import KanLMConfig, KanLMForCausalLM, loss
from kanlm.model.settings import ModelSettings


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    rng = np.random.default_rng(0)
    words = ["spline", "knot", "grid", "edge", "node", "basis"]
    for i in range(40):
        text = " ".join(rng.choice(words, size=30 + i))
        (tmp_path / f"{i}.txt").write_text(text)
    data = DataSettings(
        sources=[{"kind": "files", "path": "*.txt"}],
        root=str(tmp_path),
        cache_dir=str(tmp_path / "cache"),
        validation_fraction=0.2,
        test_fraction=0.2,
        near_duplicate_threshold=None,
    )
    return open_corpus(data, open_tokenizer(TokenizerSettings(kind="bytes"), data))


def make_model(corpus: Corpus) -> KanLMForCausalLM:
    settings = ModelSettings(
        d_model=32,
        n_layers=1,
        n_heads=2,
        context_length=64,
        feed_forward={"kind": "gelu", "hidden": 32},
    )
    torch.manual_seed(0)
    end = end_of_document(corpus.tokenizer)
    config = KanLMConfig.from_settings(settings, len(corpus.tokenizer), eos_token_id=end)
    return KanLMForCausalLM(config).double()


def test_one_window_over_everything_is_the_models_own_loss(corpus: Corpus) -> None:
    split, model = corpus.split("test"), make_model(corpus)
    end = end_of_document(corpus.tokenizer)
    stream = torch.tensor([[end, *split.tokens(0, split.n_tokens).tolist()]])
    with torch.no_grad():
        nats = model(input_ids=stream, labels=stream).loss.item()
    result = evaluate(
        model, split, context_length=split.n_tokens, stride=split.n_tokens, batch_size=1
    )
    assert result.nats_per_token == pytest.approx(nats, rel=1e-12)


def test_stride_and_batch_agree_with_the_model(corpus: Corpus) -> None:
    """Every window's logits depend on that window alone."""
    split, model = corpus.split("validation"), make_model(corpus)
    one = evaluate(model, split, context_length=64, stride=16, batch_size=1)
    many = evaluate(model, split, context_length=64, stride=16, batch_size=7)
    np.testing.assert_allclose(one.nats, many.nats, rtol=1e-12)
    less_context = evaluate(model, split, context_length=64, stride=64, batch_size=7)
    assert not np.allclose(one.nats, less_context.nats, rtol=1e-6)


class Logits(nn.Module):
    """A model of which nothing is known but its logits."""

    def __init__(self, model: KanLMForCausalLM) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


@pytest.mark.parametrize("stride", [64, 16])
def test_losses_by_chunks_are_those_of_logits(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, stride: int
) -> None:
    split, model = corpus.split("validation"), make_model(corpus)
    options: Any = {"context_length": 64, "stride": stride, "batch_size": 3}
    expected = evaluate(Logits(model), split, **options)
    monkeypatch.setattr(loss, "CHUNK_BYTES", 0)
    monkeypatch.setattr(loss, "TILE", 10)
    result = evaluate(model, split, **options)
    np.testing.assert_allclose(result.nats, expected.nats, rtol=1e-12)


def test_attention_within_documents_sees_no_other_document(corpus: Corpus) -> None:
    """A document's loss is that of the document alone after one end-of-document token."""
    split, model = corpus.split("test"), make_model(corpus)
    result = evaluate(
        model,
        split,
        context_length=split.n_tokens,
        stride=split.n_tokens,
        batch_size=1,
        attention_within_documents=True,
    )
    end = torch.tensor([end_of_document(corpus.tokenizer)])
    stops = np.cumsum(split.document_tokens)
    for index, (start, stop) in enumerate(zip([0, *stops], stops, strict=False)):
        document = torch.from_numpy(split.tokens(int(start), int(stop)))
        with torch.no_grad():
            logits = model(input_ids=torch.cat([end, document[:-1]])[None]).logits[0]
        alone = torch.nn.functional.cross_entropy(logits, document, reduction="sum").item()
        assert result.nats[index] == pytest.approx(alone, rel=1e-12)


def test_references_are_computed_once(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cached_references(corpus, "test")
    assert first == vars(references(corpus, "test"))
    # Six words in random order: log2 6 bits for each and its blank, 5.5 bytes on average.
    assert np.log2(6) / 5.5 < first["xz"] < first["bigram"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "references", lambda *_: pytest.fail("not from the cache"))
        assert cached_references(corpus, "test") == first
    monkeypatch.setattr(module, "XZ_TRAINING_BYTES", 500)
    assert 450 < cached_references(corpus, "test")["xz_training_bytes"] <= 500
