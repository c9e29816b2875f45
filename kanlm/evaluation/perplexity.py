"""How well a model predicts held-out text, counted once and normalised three ways.

Perplexity by token depends on the tokenizer and perplexity by word on what counts as a
word, so bits per byte, which depends on neither, comes first:

    bits per byte = Σ nats / (ln 2 · Σ bytes)

The end-of-document token counts as a token and as no byte: a model pays for predicting
where documents end, and no tokenizer gets bytes for it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from kanlm.data.loader import document_positions
from kanlm.errors import UserError
from kanlm.model import KanLMForCausalLM


class HeldOut(Protocol):
    """What evaluation reads of a split: a stream of tokens and where its documents end.

    `document_tokens`, `document_words` and `document_bytes` have one entry a document, in
    the order of the stream; the tokens sum to `n_tokens`.
    """

    @property
    def n_tokens(self) -> int: ...
    @property
    def document_tokens(self) -> np.ndarray: ...
    @property
    def document_words(self) -> np.ndarray: ...
    @property
    def document_bytes(self) -> np.ndarray: ...

    def tokens(self, start: int, stop: int) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Sums by document of one pass over a split; every array is (documents,).

    Figures over the whole split are ratios of sums, so each token or byte weighs the
    same whatever document or window it stands in.
    """

    #: Σ −ln p of the document's tokens, float64.
    nats: np.ndarray
    tokens: np.ndarray
    words: np.ndarray
    #: UTF-8 bytes of the text.
    bytes: np.ndarray

    @property
    def nats_per_token(self) -> float:
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def token_perplexity(self) -> float:
        """exp of nats a token: comparable between models with the same tokenizer only."""
        return float(np.exp(self.nats_per_token))

    @property
    def word_perplexity(self) -> float:
        """exp of nats a whitespace-separated word; infinite past the float range."""
        with np.errstate(over="ignore", divide="ignore"):
            return float(np.exp(self.nats.sum() / self.words.sum()))

    @property
    def bits_per_byte(self) -> float:
        return float(self.nats.sum() / self.bytes.sum() / np.log(2))

    def sums(self) -> dict[str, Any]:
        """Return totals over the split, as JSON can hold them."""
        return {name: array.sum().item() for name, array in vars(self).items()}

    def by_document(self) -> dict[str, Any]:
        """Return one list a quantity, as JSON can hold them."""
        return {name: array.tolist() for name, array in vars(self).items()}


def evaluate(
    model: nn.Module,
    split: HeldOut,
    *,
    context_length: int,
    stride: int,
    batch_size: int,
    attention_within_documents: bool = False,
    rank: int = 0,
    world_size: int = 1,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    device: torch.device | str = "cpu",
    between: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Score every token of a split once, with a window that slides over its stream.

    The stream is preceded by one end-of-document token, from which the first token is
    predicted. Window k reads `context_length` tokens from k · stride on; all but the
    first score their last `stride` tokens only, so a token sees at least
    context_length − stride tokens before it wherever the stream has them. A stride of
    context_length is cheapest, a stride of 1 gives every token its full context.

    Args:
        model: a causal language model; `model(input_ids).logits` is (batch, time, vocab)
            and `model.config.eos_token_id` the end-of-document token. A `KanLMForCausalLM`
            scores the tokens itself, without logits of all of them.
        split: the held-out text.
        context_length: tokens in a window.
        stride: tokens that the window moves by, at most `context_length`.
        batch_size: windows in one forward pass.
        attention_within_documents: restart positions at each document, which confines
            attention to it, as in training with the same setting.
        rank: this process; it takes windows rank, rank + world_size, …
        world_size: processes; all run equally many forward passes, as sharded models need.
        reduce: sums a tensor over processes; needed when there are several.
        device: where the model is.
        between: called after each forward pass; it may raise to end the evaluation.

    Raises:
        UserError: the split holds no tokens.
    """
    if (reduce is None) != (world_size == 1):
        raise ValueError("reduce is needed with several processes, and only then")
    if split.n_tokens == 0:
        raise UserError("the held-out split holds no tokens: give it more text or a larger share")
    ends = np.cumsum(split.document_tokens)
    nats = np.zeros(len(ends))
    config: Any = model.config
    end_of_document = int(config.eos_token_id)
    windows = _windows(split, context_length, stride, end_of_document, rank, world_size)
    was_training = model.training
    model.eval()
    try:
        for batch in _batched(windows, batch_size):
            scores = _score(model, batch, end_of_document, attention_within_documents, device)
            for window, scored in zip(batch, scores, strict=True):
                documents = np.searchsorted(ends, window.scored, side="right")
                nats += np.bincount(documents, weights=scored, minlength=len(ends))
            between()
    finally:
        model.train(was_training)
    if reduce is not None:
        nats = reduce(torch.from_numpy(nats).to(device)).cpu().numpy()
    return Evaluation(
        nats=nats,
        tokens=np.asarray(split.document_tokens, dtype=np.int64),
        words=np.asarray(split.document_words, dtype=np.int64),
        bytes=np.asarray(split.document_bytes, dtype=np.int64),
    )


@dataclass(frozen=True, eq=False)
class _Window:
    #: (context_length + 1,): the inputs and, one further, the targets.
    tokens: np.ndarray
    #: Places in the stream of the targets that this window scores.
    scored: np.ndarray
    #: Index of the first of them in the window.
    first: int


def _windows(
    split: HeldOut,
    context_length: int,
    stride: int,
    end_of_document: int,
    rank: int,
    world_size: int,
) -> Iterator[_Window]:
    """Yield this rank's windows; those past the end of the stream score nothing."""
    if not 1 <= stride <= context_length:
        raise ValueError(f"stride = {stride}: expected 1 ≤ stride ≤ {context_length}")
    beyond_first = max(0, split.n_tokens - context_length)
    count = 1 + -(-beyond_first // stride)
    for k in range(rank, -(-count // world_size) * world_size, world_size):
        start = k * stride
        first = context_length - stride if k else 0
        stop = min(start + context_length, split.n_tokens)
        # Input i of the stream is token i − 1, input 0 the end of a document.
        tokens = np.full(context_length + 1, end_of_document, dtype=np.int64)
        if start < stop:
            begin = max(start - 1, 0)
            place = 1 - (start - begin)
            tokens[place : place + stop - begin] = split.tokens(begin, stop)
        yield _Window(tokens, np.arange(start + first, max(stop, start + first)), first)


def _batched(windows: Iterator[_Window], size: int) -> Iterator[list[_Window]]:
    batch: list[_Window] = []
    for window in windows:
        batch.append(window)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


@torch.no_grad()
def _score(
    model: nn.Module,
    batch: list[_Window],
    end_of_document: int,
    attention_within_documents: bool,
    device: torch.device | str,
) -> list[np.ndarray]:
    """Compute −ln p of each window's scored targets, as float64 arrays."""
    tokens = np.stack([window.tokens for window in batch])
    read, targets = tokens[:, :-1], torch.from_numpy(tokens[:, 1:]).to(device)
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(read).to(device), "use_cache": False}
    if attention_within_documents:
        positions = document_positions(read, end_of_document)
        inputs["position_ids"] = torch.from_numpy(positions).to(device)
    first = min(window.first for window in batch)
    scored = [slice(w.first - first, w.first - first + len(w.scored)) for w in batch]
    if isinstance(model, KanLMForCausalLM):
        losses = model(
            **inputs,
            shift_labels=targets,
            token_losses=True,
            logits_to_keep=targets.shape[1] - first,
        ).loss
        return [row[here].cpu().double().numpy() for row, here in zip(losses, scored, strict=True)]
    scores = []
    logits, targets = model(**inputs).logits[:, first:], targets[:, first:]
    precision = torch.promote_types(logits.dtype, torch.float32)
    # Row by row, so that only one row is ever copied to the wider type.
    for row, target, here in zip(logits, targets, scored, strict=True):
        loss = functional.cross_entropy(row[here].to(precision), target[here], reduction="none")
        scores.append(loss.cpu().double().numpy())
    return scores
