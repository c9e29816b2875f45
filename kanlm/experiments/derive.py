"""From records to everything that results.json holds.

`derive` turns records into the matrices, means and differences that tables and figures show, and
nothing else ever computes them. Sums by document, which intervals are made of, stand beside it in
documents.jsonl.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from kanlm.evaluation import forgetting as metrics
from kanlm.evaluation.perplexity import Evaluation
from kanlm.evaluation.statistics import Interval, bootstrap_interval, paired_interval
from kanlm.results.schema import ARM_FACTS, SCHEMA_VERSION, EvaluationKey, Note, Record

#: Fewest documents that show any variation.
_LEAST_DOCUMENTS = 2


def derive(
    records: Sequence[Record],
    arms: Mapping[str, Mapping[str, Any]],
    *,
    domains: Sequence[str],
    documents: Mapping[EvaluationKey, Evaluation],
    references: Mapping[str, Mapping[str, Any]],
    provenance: Mapping[str, Any],
    notes: Sequence[Note] = (),
    resamples: int = 1000,
) -> dict[str, Any]:
    """Derive everything that results.json holds.

    Matrices are [stage][domain], with null where nothing was measured; `_by_seed` puts
    [seed] before that, in the order of the arm's `seeds`. Means over seeds are taken of
    bits per byte and of nats, so that perplexity is exp of a mean loss. An interval holds
    the uncertainty over documents of the mean over seeds, not that over seeds.

    Args:
        records: of one split and one strategy an arm; of several at one place the last
            step counts.
        arms: name → ARM_FACTS and whatever else should be kept, in the order shown.
        domains: those trained on in the order of their stages, then any others.
        documents: sums by document of the same evaluations; those missing have no interval.
        references: domain → bits per byte of `bigram` and `xz`, and what they were made of.
        provenance: from `kanlm.experiments.provenance.collect`.
        notes: shown on the line with the figures that they are about, or below them.
        resamples: of each bootstrap.

    Raises:
        ValueError: records or notes that do not belong together, or a missing fact of an arm.
    """
    _check(records, arms, domains, notes)
    studies = {
        name: _ArmResults([r for r in records if r.arm == name], domains, documents, resamples)
        for name in arms
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "domains": list(domains),
        "arms": {name: {**arms[name], **studies[name].derived()} for name in arms},
        "comparisons": _comparisons(studies, domains, resamples),
        "references": {name: dict(values) for name, values in references.items()},
        "provenance": dict(provenance),
        "notes": [asdict(note) for note in dict.fromkeys(notes)],
        "records": [asdict(record) for record in records],
    }


class _ArmResults:
    """The records of one arm as arrays (seeds, stages, domains)."""

    def __init__(
        self,
        records: Sequence[Record],
        domains: Sequence[str],
        documents: Mapping[EvaluationKey, Evaluation],
        resamples: int,
    ) -> None:
        self.domains = list(domains)
        self.resamples = resamples
        self.seeds = list(dict.fromkeys(record.seed for record in records))
        stages = 1 + max(record.stage for record in records)
        self.last = {}
        for record in sorted(records, key=lambda record: record.step):
            self.last[record.seed, record.stage, record.domain] = record
        shape = (len(self.seeds), stages, len(domains))
        self.bits_per_byte = np.full(shape, np.nan)
        self.nats_per_token = np.full(shape, np.nan)
        self.nats_per_word = np.full(shape, np.nan)
        for (seed, stage, domain), record in self.last.items():
            cell = self.seeds.index(seed), stage, self.domains.index(domain)
            self.bits_per_byte[cell] = record.nats / record.bytes / math.log(2)
            self.nats_per_token[cell] = record.nats / record.tokens
            self.nats_per_word[cell] = record.nats / record.words if record.words else np.nan
        self.documents = {
            key: documents[record.key]
            for key, record in self.last.items()
            if record.key in documents
        }

    def derived(self) -> dict[str, Any]:
        mean = self.bits_per_byte.mean(axis=0)
        learned = self.domains[1 : len(mean)]
        before = self.domains[: len(mean) - 1]
        lost = metrics.forgetting(self.bits_per_byte)
        gained = metrics.learning_gain(self.bits_per_byte)
        return {
            "seeds": self.seeds,
            "bits_per_byte": _nested(mean),
            "bits_per_byte_by_seed": _nested(self.bits_per_byte),
            "bits_per_byte_interval": self._intervals(),
            "perplexity": _nested(_exp(self.nats_per_token.mean(axis=0))),
            "perplexity_by_seed": _nested(_exp(self.nats_per_token)),
            "word_perplexity": _nested(_exp(self.nats_per_word.mean(axis=0))),
            "average_final_loss": _nested(metrics.average_final_loss(self.bits_per_byte).mean()),
            "forgetting": _named(before, lost),
            "forgetting_by_seed": [_named(before, [values]) for values in lost],
            "forgetting_from_best": _named(
                before, metrics.forgetting_from_best(self.bits_per_byte)
            ),
            "learning_gain": _named(learned, gained),
            "learning_gain_by_seed": [_named(learned, [values]) for values in gained],
            "forward_transfer": _named(learned, metrics.forward_transfer(self.bits_per_byte)),
            "backward_transfer": _nested(metrics.backward_transfer(self.bits_per_byte).mean()),
        }

    def pooled(self, stage: int, domain: str, seeds: Sequence[int]) -> Evaluation | None:
        """Sums by document, the nats averaged over seeds; None unless all seeds have them."""
        found = [self.documents.get((seed, stage, domain)) for seed in seeds]
        evaluations = [evaluation for evaluation in found if evaluation is not None]
        if not evaluations or len(evaluations) < len(found):
            return None
        first = evaluations[0]
        if any(not _same_documents(first, other) for other in evaluations):
            raise ValueError(f"seeds of one arm were evaluated on different text of {domain}")
        if len(first.bytes) < _LEAST_DOCUMENTS:
            return None
        nats = np.mean([evaluation.nats for evaluation in evaluations], axis=0)
        return Evaluation(nats=nats, tokens=first.tokens, words=first.words, bytes=first.bytes)

    def _intervals(self) -> list[list[list[float] | None]]:
        rows = []
        for stage in range(self.bits_per_byte.shape[1]):
            row = []
            for domain in self.domains:
                pooled = self.pooled(stage, domain, self.seeds)
                interval = pooled and bootstrap_interval(
                    pooled.nats, pooled.bytes, resamples=self.resamples, seed=0
                )
                row.append(_ends(interval))
            rows.append(row)
        return rows


def _comparisons(
    studies: Mapping[str, _ArmResults],
    domains: Sequence[str],
    resamples: int,
) -> list[dict[str, Any]]:
    """Compare every two arms by stage and domain: arm − other, paired by seed and document."""
    compared = []
    for (name, arm), (other_name, other) in itertools.combinations(studies.items(), 2):
        seeds = [seed for seed in arm.seeds if seed in other.seeds]
        stages = min(arm.bits_per_byte.shape[1], other.bits_per_byte.shape[1])
        for stage, domain in itertools.product(range(stages), domains):
            column = arm.domains.index(domain)
            by_seed = np.array(
                [
                    arm.bits_per_byte[arm.seeds.index(seed), stage, column]
                    - other.bits_per_byte[other.seeds.index(seed), stage, column]
                    for seed in seeds
                ]
            )
            if not len(by_seed) or np.isnan(by_seed).any():
                continue
            compared.append(
                {
                    "arm": name,
                    "other": other_name,
                    "stage": stage,
                    "domain": domain,
                    "seeds": seeds,
                    "difference": float(by_seed.mean()),
                    "difference_by_seed": by_seed.tolist(),
                    "difference_interval": _ends(
                        _difference(arm, other, stage, domain, seeds, resamples)
                    ),
                }
            )
    return compared


def _difference(
    arm: _ArmResults,
    other: _ArmResults,
    stage: int,
    domain: str,
    seeds: Sequence[int],
    resamples: int,
) -> Interval | None:
    ours, theirs = arm.pooled(stage, domain, seeds), other.pooled(stage, domain, seeds)
    if ours is None or theirs is None:
        return None
    if not _same_documents(ours, theirs):
        raise ValueError(f"two arms were evaluated on different text of {domain}")
    return paired_interval(ours.nats, theirs.nats, ours.bytes, resamples=resamples, seed=0)


def _check(
    records: Sequence[Record],
    arms: Mapping[str, Mapping[str, Any]],
    domains: Sequence[str],
    notes: Sequence[Note],
) -> None:
    for name, facts in arms.items():
        missing = [fact for fact in ARM_FACTS if fact not in facts]
        if missing:
            raise ValueError(f"arm {name} lacks {', '.join(missing)}")
        strategies = {record.strategy for record in records if record.arm == name}
        if len(strategies) != 1:
            raise ValueError(f"arm {name}: expected records of one strategy, not {strategies}")
    if len({record.split for record in records}) > 1:
        raise ValueError("records of several splits cannot stand in one matrix")
    every = (*records, *notes)
    named = {each.domain for each in every if each.domain is not None}
    unknown = named - set(domains) | {each.arm for each in every if each.arm is not None} - set(
        arms
    )
    if unknown:
        raise ValueError(
            f"records or notes of {', '.join(sorted(unknown))}, which was not announced"
        )


def _same_documents(one: Evaluation, other: Evaluation) -> bool:
    return np.array_equal(one.bytes, other.bytes) and np.array_equal(one.words, other.words)


def _exp(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.exp(values)


def _ends(interval: Interval | None) -> list[float] | None:
    return [interval.low, interval.high] if interval else None


def _named(
    names: Sequence[str], by_seed: np.ndarray | Sequence[np.ndarray]
) -> dict[str, float | None]:
    """Map each domain to its mean over seeds."""
    return dict(zip(names, _nested(np.mean(by_seed, axis=0)), strict=True))


def _nested(array: Any) -> Any:
    """Return nested lists that JSON can hold: null for what is not a finite number."""
    if np.ndim(array):
        return [_nested(part) for part in array]
    return float(array) if np.isfinite(array) else None
