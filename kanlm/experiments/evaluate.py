"""`kanlm evaluate`: runs side by side on the held-out documents of one or more texts.

Documents are held out by the hash of their content, with the fractions of the run's own
data, so that a text a run was trained on is measured on what it never saw. What `training_text`
finds among them all the same is left out for all runs, and said where the figures stand.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from kanlm.config import Config, DataSettings, check
from kanlm.data.corpus import Corpus, Split, open_corpus
from kanlm.data.sources import parse_source_argument
from kanlm.errors import UserError
from kanlm.evaluation.perplexity import Evaluation, evaluate
from kanlm.evaluation.references import cached_references, references
from kanlm.experiments.derive import derive
from kanlm.experiments.provenance import collect
from kanlm.experiments.single import arm_facts
from kanlm.experiments.training_text import (
    cut_as_known,
    is_held_out_by,
    known_texts,
    seen_documents,
    training_texts,
)
from kanlm.model import KanLMForCausalLM
from kanlm.model.accounting import account
from kanlm.reporting.table import print_table, quality_table
from kanlm.results.read import read_run_results
from kanlm.results.schema import EvaluationKey, Note, Record
from kanlm.training.checkpointing.export import Newest, load_newest, newest, newest_tokenizer
from kanlm.training.checkpointing.reader import read_state
from kanlm.training.resolve import resolve
from kanlm.training.run_folder import load_config
from kanlm.training.sampling import device_at_hand
from kanlm.training.state import TrainingState


@dataclass(frozen=True)
class _Subject:
    """A run that is measured."""

    config: Config
    weights: Newest
    tokenizer: PreTrainedTokenizerFast

    @property
    def name(self) -> str:
        """Its arm: the folder, with the step of an unfinished run."""
        return str(self.weights)


@dataclass(frozen=True)
class _Text:
    """A text by the corpora and held-out documents of each run, which has its own tokens.

    Attributes:
        corpora, splits: by arm; the splits hold the same documents, those that are scored.
        notes: what to know of the figures on it.
        whole: whether none of its held-out documents was left out.
    """

    domain: str
    corpora: dict[str, Corpus]
    splits: dict[str, Split]
    notes: list[Note]
    whole: bool

    def references(self, split: str) -> dict[str, Any]:
        """Return references in the first run's tokens."""
        corpus = next(iter(self.corpora.values()))
        if self.whole:
            return cached_references(corpus, split)
        part = _Part(corpus, next(iter(self.splits.values())))
        return vars(references(part, split))


class _Part:
    """A corpus of one of whose splits only some documents are read."""

    def __init__(self, corpus: Corpus, part: Split) -> None:
        self.corpus, self.part = corpus, part
        self.tokenizer = corpus.tokenizer

    def split(self, name: str) -> Split:
        return self.part if name == self.part.name else self.corpus.split(name)


def evaluate_runs(
    runs: list[Path], sources: Sequence[str], overrides: list[str], *, as_json: bool = False
) -> dict[str, Any]:
    """Evaluate runs on texts, print a table or JSON, and return what results.json holds.

    Args:
        runs: folders of runs; each is an arm, named by its folder. Of an unfinished one the
            newest checkpoint is read.
        sources: as in `parse_source_argument`, each a domain; none is the first run's own text.
        overrides: settings laid over each run's, such as `evaluation.stride=64`.

    Raises:
        UserError: a run is not there or has no weights yet, the runs hold out different text,
            an override goes unread, or all that would be scored was trained on.
    """
    verb = "evaluate --data" if sources else "evaluate"
    configs = {run: resolve(load_config(run, overrides, verb)) for run in runs}
    _check_fractions(list(configs.values()))
    first = next(iter(configs.values()))
    split = first.evaluation.split
    subjects = [_subject(run, config) for run, config in configs.items()]
    known = [data for run in configs for data in known_texts(run)]
    settings = [
        [_data(subject.config, first.data, source, known) for subject in subjects]
        for source in (sources or (None,))
    ]
    domains = [each[0].domain for each in settings]
    for domain in domains:
        if domains.count(domain) > 1:
            raise UserError(f"--data: two texts have the name '{domain}'; give each once")
    texts = [_text(subjects, each) for each in settings]
    evaluations, facts = {}, {}
    for subject in subjects:
        model = load_newest(subject.weights, subject.tokenizer)
        facts[subject.name] = _facts(subject.weights, model)
        for text in texts:
            key = EvaluationKey(
                arm=subject.name,
                seed=subject.config.seed,
                strategy=subject.config.strategy["kind"],
                stage=0,
                domain=text.domain,
                step=subject.weights.step or 0,
                split=split,
            )
            evaluations[key] = _evaluate(subject, model, text)
    try:
        results = derive(
            [Record.of(key, evaluation.sums()) for key, evaluation in evaluations.items()],
            facts,
            domains=domains,
            documents=evaluations,
            references={text.domain: text.references(split) for text in texts},
            provenance=collect(
                first,
                {text.domain: next(iter(text.corpora.values())).fingerprint for text in texts},
            ),
            notes=[note for text in texts for note in text.notes],
            resamples=first.evaluation.bootstrap_resamples,
        )
    except ValueError as error:
        raise UserError(f"these runs cannot stand side by side: {error}") from None
    if as_json:
        print(json.dumps(results, indent=1))
    else:
        print_table(quality_table(results))
    return results


def _tell(line: str) -> None:
    """Say what is being done, apart from the table or JSON."""
    print(line, file=sys.stderr, flush=True)


def _check_fractions(configs: Sequence[Config]) -> None:
    """Refuse runs that hold out different shares of a text: their documents would differ."""
    fractions = {(c.data.validation_fraction, c.data.test_fraction) for c in configs}
    if len(fractions) == 1:
        return
    smallest = min(fractions, key=sum)
    raise UserError(
        "these runs hold out different shares of their text, (validation, test) = "
        f"{' and '.join(map(str, sorted(fractions)))}; what all of them hold out is measured with "
        f"data.validation_fraction={smallest[0]:g} data.test_fraction={smallest[1]:g}"
    )


def _subject(run: Path, config: Config) -> _Subject:
    weights = newest(run, _tell)
    return _Subject(config, weights, newest_tokenizer(weights, _tell))


def _data(
    config: Config, default: DataSettings, source: str | None, known: Sequence[DataSettings]
) -> DataSettings:
    """Return the text to evaluate on, split by the fractions of the run's own data.

    Args:
        default: settings of the text where `source` is None.
        known: texts that the runs have cut into documents, which is done in the same way.
    """
    if source is None:
        return replace(
            config.data, domain=default.domain, sources=default.sources, root=default.root
        )
    sources, domain = cut_as_known(parse_source_argument(source), known)
    domain = domain or re.sub(r"[/\\:]+", "-", source).strip("-.") or "text"
    return replace(config.data, domain=domain, sources=sources, root=".")


def _text(subjects: Sequence[_Subject], settings: Sequence[DataSettings]) -> _Text:
    """Open a text for every run, without the documents that any of them was trained on.

    Raises:
        UserError: nothing is left, or it cannot be read.
    """
    domain, split = settings[0].domain, subjects[0].config.evaluation.split
    corpora = {
        subject.name: open_corpus(data, subject.tokenizer, report=_tell)
        for subject, data in zip(subjects, settings, strict=True)
    }
    splits = {name: corpus.split(split) for name, corpus in corpora.items()}
    counts = {name: each.n_documents for name, each in splits.items()}
    if len(set(counts.values())) > 1:
        raise UserError(f"these runs cannot stand side by side: documents of {domain}: {counts}")
    first = next(iter(splits.values()))
    seen, by = np.zeros(first.n_documents, dtype=bool), []
    notes = [
        Note(arm=None, domain=domain, note=line) for line in next(iter(corpora.values())).notes
    ]
    for subject in subjects:
        corpus = corpora[subject.name]
        try:
            for text in training_texts(subject.weights.run):
                if is_held_out_by(corpus.data, text.data):
                    continue
                found = seen_documents(corpus, split, text, subject.tokenizer, _tell)
                seen |= found
                by += [str(text.run)] if found.any() else []
        except UserError as error:
            unknown = f"whether this was trained on is not known: {error}"
            notes.append(Note(arm=subject.name, domain=domain, note=unknown))
    if not seen.any():
        return _Text(domain, corpora, splits, notes, whole=True)
    who = ", ".join(dict.fromkeys(by))
    if seen.all():
        raise UserError(
            f"all {len(seen):,} documents of {domain} that would be scored were trained on by {who}"
        )
    share = first.document_bytes[seen].sum() / first.document_bytes.sum()
    left_out = (
        f"{seen.sum():,} of {len(seen):,} documents, {share:.1%} of the bytes, are left out, for "
        f"they stand in what was trained on by {who}"
    )
    notes.insert(0, Note(arm=None, domain=domain, note=left_out))
    splits = {name: each.only(~seen) for name, each in splits.items()}
    return _Text(domain, corpora, splits, notes, whole=False)


def _evaluate(subject: _Subject, model: KanLMForCausalLM, text: _Text) -> Evaluation:
    config, device = subject.config, device_at_hand()
    return evaluate(
        model.to(device),  # pyright: ignore
        text.splits[subject.name],
        context_length=config.model.context_length,
        stride=config.evaluation.stride or config.model.context_length,
        batch_size=config.evaluation.batch_size,
        attention_within_documents=config.data.attention_within_documents,
        device=device,
    )


def _facts(weights: Newest, model: KanLMForCausalLM) -> dict[str, Any]:
    """Return what is known of an arm beside its losses."""
    if weights.step is None:
        path = weights.run / "results.json"
        if not path.exists():
            raise UserError(f"{weights.run} has no results.json yet: finish that run first")
        return read_run_results(path)[1]
    path = weights.place / "state.json"
    progress: TrainingState = check(TrainingState, read_state(weights.place), str(path))
    return {
        **arm_facts(account(model.config), progress, None),
        "planned_steps": weights.steps,
    }
