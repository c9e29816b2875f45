"""Batches: each token once an epoch, exact mixtures, ranks and resumption by integers."""

from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kanlm.config import DataSettings
from kanlm.data.corpus import Corpus, CorpusSource, Split, open_corpus
from kanlm.data.loader import IGNORED, Batches, EpochStream, Mixture, document_positions
from kanlm.errors import UserError


def numbered_split(n_tokens, first=0):
    """A stream in which every token is its own position, counted from `first`."""
    sizes = np.array([[n_tokens, 0, 0]], dtype=np.int64)
    kept = np.ones(1, dtype=bool)
    tokens = np.arange(first, first + n_tokens, dtype=np.uint32)
    return Split("train", None, [tokens], [sizes], [kept])  # type: ignore[arg-type]


def numbered_corpus(tokenizer, lengths, schedules):
    """Sources whose streams number their tokens on: no two tokens are the same."""
    firsts = np.cumsum([0, *lengths])
    splits = [numbered_split(length, int(f)) for length, f in zip(lengths, firsts, strict=False)]
    entries = [
        CorpusSource(None, schedule, None, {"train": split}, 0)  # type: ignore[arg-type]
        for schedule, split in zip(schedules, splits, strict=True)
    ]
    return Corpus(DataSettings(), tokenizer, entries)


@pytest.fixture
def corpus(make_data, byte_tokenizer, stories):
    data = make_data(stories(90), stories(60, seed=1), weights=[3.0, 1.0])
    return open_corpus(data, byte_tokenizer)


def batches(corpus, seed=0, batch_size=12, context_length=64, within=False):
    return Batches(
        corpus,
        seed=seed,
        batch_size=batch_size,
        context_length=context_length,
        attention_within_documents=within,
    )


@given(st.integers(2, 200), st.data())
def test_every_token_is_a_target_once_an_epoch_after_the_one_before_it(n_tokens, data):
    context_length = data.draw(st.integers(1, n_tokens - 1))
    stream = EpochStream(numbered_split(n_tokens), context_length, (data.draw(st.integers(0, 9)),))
    assert stream.n_blocks == -(-n_tokens // context_length)
    for epoch in range(3):
        places = epoch * stream.n_blocks + np.arange(stream.n_blocks)
        inputs, labels = stream.sequences(places)
        assert inputs.shape == labels.shape == (stream.n_blocks, context_length)
        np.testing.assert_array_equal(inputs[:, 1:], (inputs[:, :-1] + 1) % n_tokens)
        scored = labels != IGNORED
        np.testing.assert_array_equal(labels[scored], (inputs[scored] + 1) % n_tokens)
        assert Counter(labels[scored].tolist()) == Counter(range(n_tokens))


def test_rounds_differ_in_offset_and_order():
    stream = EpochStream(numbered_split(1000), 10, (0,))
    first, second = stream.sequences(np.arange(200))[0][:, 0].reshape(2, 100).tolist()
    assert first[0] % 10 != second[0] % 10
    assert sorted(first) != first
    order = [(start - min(first)) // 10 for start in first]
    assert order != [(start - min(second)) // 10 for start in second]


@given(
    st.lists(st.sampled_from([0.1, 0.25, 0.5, 1, 2.0, 3, 7, 0.7]), min_size=1, max_size=4),
    st.integers(0, 5),
    st.integers(0, 3),
)
def test_weights_are_exact_over_every_cycle(weights, seed, cycle):
    mixture = Mixture({0: weights}, seed)
    length = len(mixture.cycles[0].members)
    places = list(zip(*mixture.locate(cycle * length + np.arange(length)), strict=True))
    counts = Counter(source for source, _ in places)
    for source, weight in enumerate(weights):
        assert counts[source] == pytest.approx(length * weight / sum(weights), abs=1e-9)
        within = [index for owner, index in places if owner == source]
        first = cycle * counts[source]
        assert within == list(range(first, first + counts[source]))


def test_a_mixture_of_awkward_weights_is_as_exact_as_its_cycle_is_long():
    mixture = Mixture({0: [1 / 3, 0.123456789]}, 0)
    share = np.mean(mixture.locate(np.arange(10_000))[0] == 0)
    assert abs(share - (1 / 3) / (1 / 3 + 0.123456789)) <= 1e-4


def test_a_weight_too_small_to_come_up_is_refused():
    with pytest.raises(UserError, match=r"data\.sources\.1\.weight = 1e-09 is less than 1/10000"):
        Mixture({0: [1.0, 1e-9]}, 0)


@given(st.data())
def test_a_source_goes_on_where_the_stage_before_left_it(data):
    n_sources = data.draw(st.integers(1, 3))
    weights = st.lists(st.sampled_from([0, 0.5, 1, 3]), min_size=n_sources, max_size=n_sources)
    starts = data.draw(st.lists(st.integers(1, 60), unique=True, max_size=3))
    stages = {start: data.draw(weights.filter(any)) for start in (0, *starts)}
    seed = data.draw(st.integers(0, 9))
    mixture = Mixture(stages, seed)
    sources, before = mixture.locate(np.arange(150))
    for source in range(n_sources):
        assert before[sources == source].tolist() == list(range((sources == source).sum()))
    bounds = [*sorted(stages), 150]
    for start, stop in pairwise(bounds):
        shares = np.array(stages[start]) / sum(stages[start])
        length = len(mixture.cycles[bounds.index(start)].members)
        whole = start + (stop - start) // length * length
        counts = np.bincount(sources[start:whole], minlength=n_sources)
        np.testing.assert_allclose(counts, shares * (whole - start))
    # The same for a run that begins anywhere.
    first = data.draw(st.integers(0, 149))
    part = Mixture(stages, seed).locate(np.arange(first, 150))
    np.testing.assert_array_equal(part, [sources[first:], before[first:]])


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_slices_of_the_ranks_join_to_the_global_batch(shared_corpus, step, world_size):
    loader = batches(shared_corpus, within=True)
    whole = loader.batch(step)
    parts = [loader.batch(step, rank, world_size) for rank in range(world_size)]
    assert set(whole) == {"input_ids", "shift_labels", "position_ids"}
    for name, tensor in whole.items():
        assert tensor.shape == (12, 64)
        assert tensor.dtype == torch.int64
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor)


@pytest.fixture(scope="module")
def shared_corpus(tmp_path_factory, byte_tokenizer, stories, write_jsonl):
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "a.jsonl", stories(100))
    sources = [{"kind": "files", "path": "a.jsonl"}]
    data = DataSettings(sources=sources, root=str(folder), cache_dir=str(folder / "cache"))
    return open_corpus(data, byte_tokenizer)


def targets(loader, steps, world_size, micro_batch_size):
    """Targets of each sequence of so many steps, as the processes' micro-batches ask for them."""
    rows = []
    for step in range(steps):
        for rank in range(world_size):
            labels = loader.batch(step, rank, world_size)["shift_labels"]
            for micro in labels.split(micro_batch_size):
                rows += [row[row != IGNORED].tolist() for row in micro]
    return rows


@given(st.data())
def test_ranks_together_ask_for_every_token_of_every_source_once_an_epoch(byte_tokenizer, data):
    """Whatever the processes and micro-batches, and wherever an epoch ends within a batch.

    No worker loads data, so that there is nothing to divide further: a process cuts the batch
    of a step out of memory-mapped files when it comes to that step.
    """
    context_length = data.draw(st.integers(1, 12), "context_length")
    sizes = st.integers(context_length + 1, 60)
    lengths = data.draw(st.lists(sizes, min_size=1, max_size=3), "lengths")
    positive = st.sampled_from([0.5, 1.0, 2.0, 3.0])
    later = st.dictionaries(st.integers(1, 20), positive, max_size=2)
    schedules = [{0: data.draw(positive), **data.draw(later)} for _ in lengths]
    batch_size = 4 * data.draw(st.integers(1, 4), "batch_size / 4")
    world_size = data.draw(st.sampled_from([1, 2, 4]), "world_size")
    micro_batch_size = data.draw(st.integers(1, batch_size // world_size), "micro_batch_size")
    loader = batches(
        numbered_corpus(byte_tokenizer, lengths, schedules),
        seed=data.draw(st.integers(0, 9), "seed"),
        batch_size=batch_size,
        context_length=context_length,
    )
    # Two epochs at least of the source that comes round last, after the last change of weights.
    counts = loader.mixture.cycles[-1].counts
    cycles = max(-(-2 * c.n_blocks // n) for c, n in zip(loader.streams, counts, strict=True))
    steps = max(map(max, schedules)) + 1 + cycles * int(counts.sum()) // batch_size
    rows = targets(loader, steps, world_size, micro_batch_size)
    first = 0
    for stream, length in zip(loader.streams, lengths, strict=True):
        own = [row for row in rows if first <= row[0] < first + length]
        for start in range(0, len(own) - stream.n_blocks + 1, stream.n_blocks):
            epoch = own[start : start + stream.n_blocks]
            assert sorted(chain.from_iterable(epoch)) == list(range(first, first + length))
        assert len(own) >= 2 * stream.n_blocks
        first += length


def test_the_same_seed_and_step_give_the_same_batch_in_a_fresh_object(corpus):
    used = batches(corpus)
    sequence = [used.batch(step) for step in range(60)]
    for step in (59, 0, 31):
        fresh = batches(corpus).batch(step)
        assert all(torch.equal(fresh[name], sequence[step][name]) for name in fresh)
    assert set(sequence[0]) == {"input_ids", "shift_labels"}
    other = batches(corpus, seed=1).batch(0)
    assert not torch.equal(other["input_ids"], sequence[0]["input_ids"])


def test_batch_size_does_not_change_the_series_of_sequences(corpus):
    large = torch.cat([batches(corpus).batch(step)["input_ids"] for step in range(2)])
    small = torch.cat([batches(corpus, batch_size=4).batch(step)["input_ids"] for step in range(6)])
    assert torch.equal(large, small)


def test_an_epoch_of_a_corpus_has_every_token_of_every_source_by_weight(corpus):
    loader = batches(corpus)
    first, second = loader.streams
    # Three sequences of the first source for one of the second: run both to whole rounds.
    rounds = np.lcm(3 * second.n_blocks, first.n_blocks)
    counts = np.zeros(257, dtype=np.int64)
    _, labels = loader._sequences(np.arange(rounds // 3 * 4))
    counts += np.bincount(labels[labels != IGNORED], minlength=257)
    expected = np.zeros(257, dtype=np.int64)
    for stream, times in (
        (first, rounds // first.n_blocks),
        (second, rounds // 3 // second.n_blocks),
    ):
        tokens = stream.split.tokens(0, stream.split.n_tokens)
        expected += times * np.bincount(tokens, minlength=257)
    np.testing.assert_array_equal(counts, expected)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.data())
def test_a_window_reads_on_in_the_next_segments_and_past_the_end(lengths, data):
    n_tokens = sum(lengths)
    kept = [np.ones(1, dtype=bool)] * len(lengths)
    arrays = np.split(np.arange(n_tokens, dtype=np.uint16), np.cumsum(lengths)[:-1])
    sizes = [np.array([[length, 0, 0]]) for length in lengths]
    split = Split("train", None, arrays, sizes, kept)  # type: ignore[arg-type]
    if n_tokens:
        starts = np.array(data.draw(st.lists(st.integers(0, n_tokens - 1), max_size=4)), dtype=int)
        length = data.draw(st.integers(1, n_tokens))
        expected = (starts[:, None] + np.arange(length)) % n_tokens
        np.testing.assert_array_equal(split.windows(starts, length), expected)
    start = data.draw(st.integers(0, n_tokens))
    stop = data.draw(st.integers(start, n_tokens))
    assert split.tokens(start, stop).tolist() == list(range(start, stop))


@given(st.lists(st.lists(st.integers(0, 2), min_size=7, max_size=7), min_size=1, max_size=3))
def test_positions_restart_at_every_end_of_document(rows):
    expected = []
    for row in rows:
        positions, position = [], -1
        for token in row:
            position = 0 if token == 2 else position + 1
            positions.append(position)
        expected.append(positions)
    assert document_positions(np.array(rows), 2).tolist() == expected


def test_a_context_longer_than_the_data_is_refused(corpus):
    n_tokens = min(entry.splits["train"].n_tokens for entry in corpus.sources)
    batches(corpus, context_length=n_tokens - 1).batch(0)
    with pytest.raises(
        UserError, match=rf"context_length = {n_tokens}: longer than the .* of part1"
    ):
        batches(corpus, context_length=n_tokens)


def test_ranks_that_cannot_share_the_batch_are_refused(corpus):
    with pytest.raises(UserError, match=r"batch_size = 12: not divisible among 5 processes"):
        batches(corpus).batch(0, 0, 5)
