"""The sliding window against a loop that feeds the model one token's context at a time."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kanlm.errors import UserError
from kanlm.evaluation.perplexity import Evaluation, evaluate

VOCAB = 11
END = 10


class Split:
    """Documents made by hand: lists of tokens, each given its end-of-document token."""

    def __init__(self, documents: list[list[int]]) -> None:
        ended = [[*document, END] for document in documents]
        self.stream = np.array([token for document in ended for token in document], dtype=np.uint16)
        self.n_tokens = len(self.stream)
        self.document_tokens = np.array([len(document) for document in ended], dtype=np.int64)
        self.document_words = self.document_tokens
        self.document_bytes = 3 * (self.document_tokens - 1)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= self.n_tokens
        return self.stream[start:stop]


class Recurrent(nn.Module):
    """Causal, and sensitive to all the context it is given; records what it was given."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(eos_token_id=END)
        self.embedding = nn.Embedding(VOCAB, 8, dtype=dtype)
        self.rnn = nn.GRU(8, 8, batch_first=True, dtype=dtype)
        self.head = nn.Linear(8, VOCAB, dtype=dtype)
        self.dropout = nn.Dropout(0.5)
        self.positions: list[torch.Tensor] = []
        self.batches: list[int] = []

    def forward(self, input_ids: torch.Tensor, position_ids=None, use_cache=None):
        assert use_cache is False
        self.batches.append(len(input_ids))
        if position_ids is not None:
            self.positions.append(position_ids)
        hidden, _ = self.rnn(self.embedding(input_ids))
        return SimpleNamespace(logits=self.head(self.dropout(3 * hidden)))


def random_split(lengths: list[int], seed: int = 0) -> Split:
    rng = np.random.default_rng(seed)
    return Split([rng.integers(0, END, n).tolist() for n in lengths])


@torch.no_grad()
def one_at_a_time(model: nn.Module, split: Split, context_length: int, stride: int) -> np.ndarray:
    """nats (documents,): every token from the prefix that the window scheme promises it."""
    model.eval()
    inputs = [END, *split.stream.tolist()]
    nats = []
    for place, target in enumerate(split.stream.tolist()):
        start = 0
        while place - start >= context_length:
            start += stride
        prefix = torch.tensor([inputs[start : place + 1]])
        assert prefix.shape[1] >= min(place + 1, context_length - stride + 1)
        logits = model(prefix, use_cache=False).logits[0, -1]
        nats.append(-torch.log_softmax(logits, dim=-1)[target].item())
    by_document = np.split(np.array(nats), np.cumsum(split.document_tokens)[:-1])
    return np.array([part.sum() for part in by_document])


@pytest.mark.parametrize("stride", [1, 3, 7, 8])
@pytest.mark.parametrize("lengths", [[5, 0, 17, 9], [2], [7], [8, 15]])
def test_equals_scoring_one_token_at_a_time(stride: int, lengths: list[int]) -> None:
    split, model = random_split(lengths), Recurrent()
    result = evaluate(model, split, context_length=8, stride=stride, batch_size=3)
    expected = one_at_a_time(model, split, 8, stride)
    np.testing.assert_allclose(result.nats, expected, rtol=1e-12)
    assert max(model.batches) <= 3


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_divide_the_windows_and_sum_to_one_pass(world_size: int) -> None:
    split = random_split([13, 4, 21, 6])
    whole = evaluate(Recurrent(), split, context_length=8, stride=4, batch_size=2)
    shares, passes = [], []

    def collect(tensor: torch.Tensor) -> torch.Tensor:
        shares.append(tensor)
        return tensor

    for rank in range(world_size):
        model = Recurrent()
        evaluate(
            model,
            split,
            context_length=8,
            stride=4,
            batch_size=2,
            rank=rank,
            world_size=world_size,
            reduce=collect,
        )
        passes.append(model.batches)
    np.testing.assert_allclose(torch.stack(shares).sum(0).numpy(), whole.nats, rtol=1e-12)
    assert all((share > 0).any() for share in shares)
    assert all(batches == passes[0] for batches in passes)


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    context_length=st.integers(1, 12),
    data=st.data(),
)
@settings(max_examples=60)
def test_each_token_is_scored_exactly_once(lengths, context_length, data) -> None:
    class Uniform(nn.Module):
        config = SimpleNamespace(eos_token_id=END)

        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, VOCAB))

    split = random_split(lengths)
    stride = data.draw(st.integers(1, context_length))
    result = evaluate(Uniform(), split, context_length=context_length, stride=stride, batch_size=4)
    np.testing.assert_allclose(result.nats, split.document_tokens * np.log(VOCAB), rtol=1e-6)


def test_positions_restart_as_in_training() -> None:
    model = Recurrent()
    split = Split([[1, 2], [3], [4, 5, 6]])
    evaluate(
        model,
        split,
        context_length=5,
        stride=5,
        batch_size=2,
        attention_within_documents=True,
    )
    # The windows read END 1 2 END 3 and END 4 5 6 END.
    assert torch.cat(model.positions).tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]


def test_half_precision_logits_are_scored_in_float32() -> None:
    split = random_split([40])
    model = Recurrent(torch.bfloat16)
    with torch.no_grad():
        logits = model.eval()(torch.tensor([[END, *split.stream[:-1].tolist()]]), use_cache=False)
    targets = torch.tensor(split.stream.astype(int))
    exact = nn.functional.cross_entropy(logits.logits[0].double(), targets, reduction="sum")
    result = evaluate(model, split, context_length=64, stride=64, batch_size=1)
    assert result.nats[0] == pytest.approx(exact.item(), rel=1e-6)


def test_leaves_the_model_in_its_mode() -> None:
    model = Recurrent().train()
    first = evaluate(model, random_split([9]), context_length=4, stride=4, batch_size=2)
    second = evaluate(model, random_split([9]), context_length=4, stride=4, batch_size=2)
    assert model.training
    assert first.nats == second.nats


def test_figures_are_ratios_of_sums() -> None:
    # 6 ln 2 nats over 4 tokens, 2 words and 3 bytes.
    result = Evaluation(
        nats=np.array([5, 1]) * np.log(2),
        tokens=np.array([3, 1]),
        words=np.array([2, 0]),
        bytes=np.array([3, 0]),
    )
    assert result.nats_per_token == pytest.approx(1.5 * np.log(2))
    assert result.token_perplexity == pytest.approx(2**1.5)
    assert result.word_perplexity == pytest.approx(8)
    assert result.bits_per_byte == pytest.approx(2)
    assert result.sums() == {"nats": 6 * np.log(2), "tokens": 4, "words": 2, "bytes": 3}
    assert json.loads(json.dumps(result.by_document()))["tokens"] == [3, 1]


def test_refuses_what_it_cannot_score() -> None:
    empty = Split([])
    with pytest.raises(UserError, match="no tokens"):
        evaluate(Recurrent(), empty, context_length=4, stride=4, batch_size=2)
    with pytest.raises(ValueError, match="stride = 5"):
        evaluate(Recurrent(), random_split([3]), context_length=4, stride=5, batch_size=2)
    with pytest.raises(ValueError, match="reduce"):
        evaluate(
            Recurrent(), random_split([3]), context_length=4, stride=4, batch_size=2, world_size=2
        )
