"""results.json: long records, and everything that is derived from them.

A `Record` is one evaluation: sums of nats, tokens, words and bytes of one split, with
where it stands in the study. Sums by document lie beside in documents.jsonl, for
intervals. `derive` turns records into the matrices, means and differences that tables and
figures show, and nothing else ever computes them.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from kanlm.errors import UserError
from kanlm.evaluation.perplexity import Evaluation
from kanlm.evaluation.statistics import Interval, bootstrap_interval, paired_interval
from kanlm.experiments.continual import metrics
from kanlm.files import write_text
from kanlm.reading import parse_object, read_bytes
from kanlm.reporting.contents import SCHEMA_VERSION

#: What `derive` is told of an arm; None where it is not known.
ARM_FACTS = (
    "feed_forward",
    "parameters",
    "feed_forward_parameters",
    "flops_per_token",
    "train_tokens",
    "train_seconds",
    "compile_seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "steps",
    "skipped_steps",
)

#: Fewest documents that show any variation.
_LEAST_DOCUMENTS = 2


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an evaluation stands in a study."""

    arm: str
    seed: int
    strategy: str
    #: Stages trained so far, pretraining being 0.
    stage: int
    #: Domain of the held-out text.
    domain: str
    #: Updates of that stage.
    step: int
    split: str


@dataclass(frozen=True, kw_only=True)
class Record(Place):
    """One evaluation: sums over a split."""

    nats: float
    tokens: int
    words: int
    bytes: int

    @classmethod
    def of(cls, evaluation: Evaluation, place: Place) -> Self:
        """Sum an evaluation over its documents."""
        return cls(**asdict(place), **evaluation.sums())

    @property
    def place(self) -> Place:
        return Place(**{name: getattr(self, name) for name in Place.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class Note:
    """What a reader must know of figures, in words: what was left out, or is not as usual."""

    #: None is every arm.
    arm: str | None = None
    #: None is every domain.
    domain: str | None = None
    note: str


# Deriving


def derive(
    records: Sequence[Record],
    arms: Mapping[str, Mapping[str, Any]],
    *,
    domains: Sequence[str],
    documents: Mapping[Place, Evaluation],
    references: Mapping[str, Mapping[str, Any]],
    provenance: Mapping[str, Any],
    notes: Sequence[Note] = (),
    resamples: int = 1000,
) -> dict[str, Any]:
    """Everything that results.json holds.

    Matrices are [stage][domain], with null where nothing was measured; `_by_seed` puts
    [seed] before that, in the order of the arm's `seeds`. Means over seeds are taken of
    bits per byte and of nats, so that perplexity is exp of a mean loss. An interval holds
    the uncertainty over documents of the mean over seeds, not that over seeds.

    Arguments:
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
        documents: Mapping[Place, Evaluation],
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
            key: documents[record.place]
            for key, record in self.last.items()
            if record.place in documents
        }

    def derived(self) -> dict[str, Any]:
        mean = self.bits_per_byte.mean(axis=0)
        learned = self.domains[1 : len(mean)]
        before = self.domains[: len(mean) - 1]
        matrices = list(self.bits_per_byte)
        lost = [metrics.forgetting(matrix) for matrix in matrices]
        transfers = [metrics.backward_transfer(matrix) for matrix in matrices]
        return {
            "seeds": self.seeds,
            "bits_per_byte": _nested(mean),
            "bits_per_byte_by_seed": _nested(self.bits_per_byte),
            "bits_per_byte_interval": self._intervals(),
            "perplexity": _nested(_exp(self.nats_per_token.mean(axis=0))),
            "perplexity_by_seed": _nested(_exp(self.nats_per_token)),
            "word_perplexity": _nested(_exp(self.nats_per_word.mean(axis=0))),
            "average_final_loss": _nested(
                np.mean([metrics.average_final_loss(matrix) for matrix in matrices])
            ),
            "forgetting": _named(before, lost),
            "forgetting_by_seed": [_named(before, [values]) for values in lost],
            "forgetting_from_best": _named(
                before, [metrics.forgetting_from_best(matrix) for matrix in matrices]
            ),
            "learning_gain": _named(
                learned, [metrics.learning_gain(matrix) for matrix in matrices]
            ),
            "learning_gain_by_seed": [
                _named(learned, [metrics.learning_gain(matrix)]) for matrix in matrices
            ],
            "forward_transfer": _named(
                learned, [metrics.forward_transfer(matrix) for matrix in matrices]
            ),
            "backward_transfer": (
                None if None in transfers else _nested(np.mean(np.array(transfers, dtype=float)))
            ),
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
    """Every two arms at every stage and domain: arm − other, paired by seed and document."""
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


def _named(names: Sequence[str], by_seed: Sequence[np.ndarray]) -> dict[str, float | None]:
    """Domain → mean over seeds."""
    return dict(zip(names, _nested(np.mean(by_seed, axis=0)), strict=True))


def _nested(array: Any) -> Any:
    """Nested lists that JSON can hold: null for what is not a finite number."""
    if np.ndim(array):
        return [_nested(part) for part in array]
    return float(array) if np.isfinite(array) else None


# Files


def write_results(
    folder: Path, results: Mapping[str, Any], documents: Mapping[Place, Evaluation]
) -> None:
    """Write documents.jsonl and then results.json, each whole or not at all.

    Raises:
        UserError: a loss is no finite number, the folder cannot be written, or the disk is full.
    """
    for place, evaluation in documents.items():
        if not np.isfinite(evaluation.nats).all():
            raise UserError(
                f"{folder}: the loss of {place.arm} on {place.domain} is no finite number, and "
                "there are no results to write"
            )
    write_documents(folder / "documents.jsonl", documents)
    write_text(folder / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")


def notes_of(results: Mapping[str, Any]) -> list[Note]:
    """The notes in what results.json holds."""
    return [
        Note(**{key: note[key] for key in ("arm", "domain", "note")}) for note in results["notes"]
    ]


def records_of(results: Mapping[str, Any]) -> list[Record]:
    """The records in what results.json holds."""
    names = Record.__dataclass_fields__
    return [Record(**{name: record[name] for name in names}) for record in results["records"]]


def write_documents(path: Path, documents: Mapping[Place, Evaluation]) -> None:
    """Write sums by document, one line an evaluation."""
    lines = [
        json.dumps({**asdict(place), **evaluation.by_document()})
        for place, evaluation in documents.items()
    ]
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_documents(path: Path) -> dict[Place, Evaluation]:
    """Read what `write_documents` wrote.

    Raises:
        UserError: the file cannot be read, or a line is none that was written here.
    """
    *lines, rest = read_bytes(path).split(b"\n")
    documents = {}
    for number, line in enumerate([*lines, rest] if rest else lines, 1):
        try:
            values = parse_object(line, finite=True)
            place = Place(**{name: values[name] for name in Place.__dataclass_fields__})
            documents[place] = _evaluation(values)
        except (ValueError, KeyError, TypeError, OverflowError):
            raise UserError(f"{path}, line {number}: expected sums by document") from None
    return documents


def _evaluation(values: Mapping[str, Any]) -> Evaluation:
    """Sums by document: equally many of each, one at least."""
    nats = np.array(values["nats"])
    counts = {name: np.array(values[name]) for name in ("tokens", "words", "bytes")}
    if nats.ndim != 1 or not len(nats) or nats.dtype.kind not in "fi":
        raise ValueError("nats are no list of numbers")
    for counted in counts.values():
        if counted.shape != nats.shape or counted.dtype != np.int64 or counted.min() < 0:
            raise ValueError("counts are not those of the same documents")
    return Evaluation(nats=nats.astype(np.float64), **counts)
