"""Training batches as a pure function of (seed, step).

The stream of a source's N training tokens is a circle. In every epoch it is cut, from an
offset drawn for that epoch, into ⌈N / context_length⌉ blocks that are visited in an order
drawn for that epoch; labels of the last block that the first has already are −100, so that
every token is a target exactly once an epoch. Sequence n of a mixture comes from a source
given by a cycle in which each has exactly its share. Where weights change, each source continues
with the sequence after its last. Nothing but integers is remembered: a run resumes at step k by
asking for step k, and ranks take slices of the same batch. No workers load data, for there is
nothing to wait for but the reading of memory-mapped tokens.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch

from kanlm.config import mixture_stages
from kanlm.data.corpus import Corpus, Split
from kanlm.data.tokenizer import end_of_document
from kanlm.errors import UserError

IGNORED = -100

#: Longest cycle of a mixture: weights are exact as far as their ratios fit into it.
LONGEST_CYCLE = 10_000


class Batches:
    """Global batches of a corpus, and each rank's slice of them.

    Args:
        corpus: its training split is read.
        seed: decides offsets, orders and the cycles of the mixture.
        batch_size: sequences in a global batch.
        context_length: tokens in a sequence.
        attention_within_documents: give position_ids as of `document_positions`.

    Raises:
        UserError: a source has not more training tokens than the context is long.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        seed: int,
        batch_size: int,
        context_length: int,
        attention_within_documents: bool,
    ) -> None:
        corpus.split("train")
        self.batch_size = batch_size
        self.context_length = context_length
        self.end = end_of_document(corpus.tokenizer)
        self.attention_within_documents = attention_within_documents
        for entry in corpus.sources:
            n_tokens = entry.splits["train"].n_tokens
            if n_tokens <= context_length:
                raise UserError(
                    f"model.context_length = {context_length}: longer than the {n_tokens} "
                    f"training tokens of {entry.source.label}"
                )
        stages = mixture_stages([entry.weights for entry in corpus.sources])
        self.mixture = Mixture(
            {step * batch_size: weights for step, weights in stages.items()}, seed
        )
        self.streams = [
            EpochStream(entry.splits["train"], context_length, (seed, number))
            for number, entry in enumerate(corpus.sources)
        ]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> dict[str, torch.Tensor]:
        """Return the rows of batch `step` that belong to `rank`.

        Returns:
            input_ids and shift_labels, (batch_size / world_size, context_length) int64;
            shift_labels are the tokens that follow, −100 where none is asked for. With
            attention_within_documents also position_ids of the same shape.

        Raises:
            UserError: the ranks cannot share the batch equally.
        """
        if self.batch_size % world_size:
            raise UserError(
                f"training.batch_size = {self.batch_size}: not divisible among "
                f"{world_size} processes"
            )
        share = self.batch_size // world_size
        first = step * self.batch_size + rank * share
        inputs, labels = self._sequences(np.arange(first, first + share))
        batch = {"input_ids": torch.from_numpy(inputs), "shift_labels": torch.from_numpy(labels)}
        if self.attention_within_documents:
            batch["position_ids"] = torch.from_numpy(document_positions(inputs, self.end))
        return batch

    def _sequences(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and labels of sequences of the mixture, (n, context_length) int64 each."""
        if len(self.streams) == 1:
            return self.streams[0].sequences(indices)
        sources, within = self.mixture.locate(indices)
        inputs = np.empty((len(indices), self.context_length), dtype=np.int64)
        labels = np.empty_like(inputs)
        for number, stream in enumerate(self.streams):
            own = sources == number
            inputs[own], labels[own] = stream.sequences(within[own])
        return inputs, labels


class EpochStream:
    """The endless series of blocks of one source.

    Args:
        split: stream of N tokens.
        context_length: tokens in a block, fewer than N.
        seed: integers that everything drawn depends on.
    """

    def __init__(self, split: Split, context_length: int, seed: tuple[int, ...]) -> None:
        self.split = split
        self.context_length = context_length
        self.n_blocks = math.ceil(split.n_tokens / context_length)
        self._epoch = lru_cache(maxsize=2)(lambda epoch: self._draw((*seed, epoch)))

    def sequences(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and labels of blocks of the series, (n, context_length) int64 each."""
        n_tokens = self.split.n_tokens
        epochs, places = np.divmod(indices, self.n_blocks)
        offsets, begins = np.empty_like(indices), np.empty_like(indices)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            offsets[now], order = self._epoch(int(epoch))
            begins[now] = order[places[now]] * self.context_length
        tokens = self.split.windows((offsets + begins) % n_tokens, self.context_length + 1)
        inputs, labels = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        for row in np.flatnonzero(begins > n_tokens - self.context_length):
            labels[row, n_tokens - begins[row] :] = IGNORED
        return inputs, labels

    def _draw(self, seed: tuple[int, ...]) -> tuple[int, np.ndarray]:
        """Draw an epoch's offset and order of blocks."""
        generator = np.random.default_rng(_words(seed))
        offset = int(generator.integers(self.split.n_tokens))
        return offset, generator.permutation(self.n_blocks)


class Mixture:
    """Which source each sequence comes from, by weights that may change.

    Args:
        stages: number of a sequence → weights of the sources from that one on, 0 or more; there
            is one for 0.
        seed: of the sources' order.

    Raises:
        UserError: a weight is too small beside the others to come up in a cycle.
    """

    def __init__(self, stages: Mapping[int, Sequence[float]], seed: int) -> None:
        starts = sorted(stages)
        self.starts = np.array(starts)
        self.cycles = [Cycle(stages[start], (seed, n)) for n, start in enumerate(starts)]
        lengths = [stop - start for start, stop in pairwise(starts)]
        given = [c.given(n) for c, n in zip(self.cycles, lengths, strict=False)]
        #: Sequences that each source gave before a stage, (stages, sources).
        self.given = np.cumsum([np.zeros_like(self.cycles[0].counts), *given], axis=0)

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each sequence, and how many sequences it gave before, (n,) each.

        Args:
            indices: numbers of sequences, rising.
        """
        sources, before = np.empty_like(indices), np.empty_like(indices)
        stages = np.searchsorted(self.starts, indices, side="right") - 1
        for stage in np.unique(stages):
            own = stages == stage
            sources[own], within = self.cycles[stage].locate(indices[own] - self.starts[stage])
            before[own] = self.given[stage, sources[own]] + within
        return sources, before


class Cycle:
    """Endless cycles of the sources by one set of weights.

    In every cycle each source has its exact share, in an order drawn for that cycle. The
    cycle is the shortest that the weights' ratios fit into.
    """

    def __init__(self, weights: Sequence[float], seed: tuple[int, int]) -> None:
        shares = [Fraction(str(weight)) for weight in weights]
        shares = [share / sum(shares) for share in shares]
        length = math.lcm(*(share.denominator for share in shares))
        if length > LONGEST_CYCLE:
            length = LONGEST_CYCLE
        self.counts = np.array(_apportion(shares, length))
        for number, (weight, count) in enumerate(zip(weights, self.counts, strict=True)):
            if weight and not count:
                raise UserError(
                    f"data.sources.{number}.weight = {weight} is less than 1/{LONGEST_CYCLE} of "
                    f"the weights' sum {sum(weights)}"
                )
        self.members = np.repeat(np.arange(len(weights)), self.counts)
        first, stage = seed
        self._cycle = lru_cache(maxsize=2)(lambda cycle: self._draw((first, cycle, stage)))

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what `Mixture.locate` does, counted from the first of these cycles on."""
        cycles, places = np.divmod(indices, len(self.members))
        sources, before = np.empty_like(indices), np.empty_like(indices)
        # Indices rise, so that a cycle's are neighbours.
        bounds = np.flatnonzero(np.diff(cycles, prepend=-1, append=-1)).tolist()
        for first, stop in pairwise(bounds):
            order, given = self._cycle(int(cycles[first]))
            own = places[first:stop]
            sources[first:stop], before[first:stop] = order[own], given[own]
        return sources, cycles * self.counts[sources] + before

    def given(self, length: int) -> np.ndarray:
        """Return how many of the first `length` sequences each source gives, (sources,)."""
        cycles, rest = divmod(length, len(self.members))
        order, _ = self._cycle(cycles)
        return cycles * self.counts + np.bincount(order[:rest], minlength=len(self.counts))

    def _draw(self, seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        order = np.random.default_rng(_words(seed)).permutation(self.members)
        before = np.empty(len(order), dtype=np.int64)
        for source, count in enumerate(self.counts.tolist()):
            before[order == source] = np.arange(count)
        return order, before


def document_positions(inputs: np.ndarray, end: int) -> np.ndarray:
    """Count positions from 0 at the row's start and at every end-of-document token.

    As an input that token opens the next document, whose first token is predicted from it
    alone: sampling starts a document in the same way.

    Args:
        inputs: (batch, context_length) token ids.
        end: id of the end-of-document token.

    Returns:
        (batch, context_length) int64.
    """
    columns = np.arange(inputs.shape[1])
    starts = np.where(inputs == end, columns, 0)
    np.maximum.accumulate(starts, axis=1, out=starts)
    return np.subtract(columns, starts, out=starts)


def _apportion(shares: list[Fraction], length: int) -> list[int]:
    """Share out `length` places by the largest remainders."""
    counts = [math.floor(share * length) for share in shares]
    remainders = [share * length - count for share, count in zip(shares, counts, strict=True)]
    by_remainder = sorted(range(len(shares)), key=lambda i: -remainders[i])
    for index in by_remainder[: length - sum(counts)]:
        counts[index] += 1
    return counts


def _words(seed: tuple[int, ...]) -> list[int]:
    """Make any integers fit for numpy, which takes none below 0."""
    return [value % 2**64 for value in seed]
