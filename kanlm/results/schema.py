"""The fields of results.json with their types.

Matrices are [stage][domain], with null where nothing was measured; `_by_seed` puts [seed] before
that, in the order of the arm's `seeds`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field

# pydantic takes no other before Python 3.12.
from typing_extensions import NotRequired, TypedDict  # noqa: UP035

SCHEMA_VERSION = 2
#: Larger numbers have no differences and no place on an axis.
LARGEST = 1e100

Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Whole = Annotated[int, Field(ge=0, lt=2**63)]
Quantity = Annotated[float, Field(ge=0, le=LARGEST)]
Positive = Annotated[float, Field(gt=0, le=LARGEST)]
Matrix = list[list[Number | None]]
#: A matrix of perplexities, which may be as large as a number can be.
Perplexities = list[list[float | None]]
ByDomain = dict[str, Number | None]


# Records


@dataclass(frozen=True, kw_only=True)
class EvaluationKey:
    """What was evaluated: a study holds one record of each.

    Attributes:
        stage: stages trained so far, pretraining being 0.
        domain: of the held-out text.
        step: updates of that stage.
    """

    arm: str
    seed: Whole
    strategy: str
    stage: Whole
    domain: str
    step: Whole
    split: str


@dataclass(frozen=True, kw_only=True)
class Record(EvaluationKey):
    """One evaluation: sums over a split."""

    nats: Number
    tokens: Annotated[Whole, Field(gt=0)]
    words: Whole
    bytes: Annotated[Whole, Field(gt=0)]

    @classmethod
    def of(cls, key: EvaluationKey, sums: Mapping[str, Any]) -> Self:
        """Make the record of an evaluation's sums: `nats`, `tokens`, `words` and `bytes`."""
        return cls(**asdict(key), **sums)

    @property
    def key(self) -> EvaluationKey:
        return EvaluationKey(
            **{name: getattr(self, name) for name in EvaluationKey.__dataclass_fields__}
        )


@dataclass(frozen=True, kw_only=True)
class Note:
    """What a reader must know of figures, in words: what was left out, or is not as usual.

    Attributes:
        arm: None is every arm.
        domain: None is every domain.
    """

    arm: str | None
    domain: str | None
    note: str


# Arms


class Accounting(TypedDict):
    """What tables show of `kanlm.model.accounting`."""

    parameters: dict[str, Whole]
    flops_per_token: dict[str, Whole]
    active_parameters: Whole
    decoded_parameters: Whole


class Validation(TypedDict):
    """The best validation of a run."""

    nats_per_token: Number | None
    step: Whole


@dataclass(frozen=True)
class Trial:
    """One trial of an arm's grid, once it is over.

    Attributes:
        settings: by dotted name.
        bits_per_byte: validation loss of the model that the trial ended with; None of one that
            diverged.
        step: updates after which it was measured; of a trial that gave up, the last one.
    """

    settings: dict[str, Any]
    state: Literal["finished", "diverged"]
    bits_per_byte: Number | None
    step: Whole
    chosen: bool


class Edge(TypedDict):
    """A setting whose chosen value is the first or last of those tried."""

    setting: str
    value: Number
    edge: Literal["smallest", "largest"]


class Sweep(TypedDict):
    """What an arm tried before its runs."""

    seed: Whole
    domain: str
    split: Literal["validation"]
    trials: Annotated[list[Trial], Field(min_length=1)]
    edges: list[Edge]
    #: In the folder, but not of the grid.
    other_trials: Whole


class ArmFacts(TypedDict):
    """What is known of an arm beside its losses; None where it is not known."""

    #: Structure and basis, as the block's label.
    feed_forward: str
    parameters: Whole | None
    feed_forward_parameters: Whole | None
    flops_per_token: Quantity | None
    train_tokens: Whole | None
    train_seconds: Positive | None
    tokens_per_second: Quantity | None
    peak_memory_bytes: Whole | None
    steps: Whole | None
    skipped_steps: Whole | None
    compile_seconds: NotRequired[Quantity | None]
    bytes_per_decoded_token: NotRequired[Quantity | None]
    best_validation: NotRequired[Validation]
    accounting: NotRequired[Accounting]


#: Facts that every arm states, and those that a single run knows, from which a study adds them up.
ARM_FACTS = sorted(ArmFacts.__required_keys__)
RUN_FACTS = [*ARM_FACTS, "bytes_per_decoded_token", "best_validation", "accounting"]


class Arm(ArmFacts):
    """An arm's facts, and what is derived from its records."""

    sweep: NotRequired[Sweep]
    seeds: Annotated[list[Whole], Field(min_length=1)]
    bits_per_byte: Matrix
    bits_per_byte_by_seed: list[Matrix]
    bits_per_byte_interval: list[list[tuple[Number, Number] | None]]
    perplexity: Perplexities
    word_perplexity: Perplexities
    average_final_loss: Number | None
    forgetting: ByDomain
    forgetting_by_seed: list[ByDomain]
    forgetting_from_best: ByDomain
    learning_gain: ByDomain
    learning_gain_by_seed: list[ByDomain]
    forward_transfer: ByDomain
    backward_transfer: Number | None


# The whole


class Comparison(TypedDict):
    """Two arms after one stage on one domain."""

    arm: str
    other: str
    stage: Whole
    domain: str
    difference: Number
    difference_by_seed: Annotated[list[Number], Field(min_length=1)]
    difference_interval: tuple[Number, Number] | None


@dataclass(frozen=True)
class References:
    """Bits per byte of a bigram and of xz, with what they were made of.

    Attributes:
        bigram_discount: that did best on validation.
    """

    bigram: Number
    bigram_discount: Number
    bigram_training_tokens: Whole
    xz: Number
    xz_training_bytes: Whole
    xz_heldout_bytes: Whole


class Hardware(TypedDict):
    """The machine that a result was made on."""

    platform: str
    cpu: str
    cores: Whole | None
    threads: Whole
    memory_bytes: Whole
    gpus: list[str]


class Provenance(TypedDict, total=False):
    """What a result was made with: code, versions, machine, settings and text."""

    commit: str | None
    dirty: bool | None
    parallel_runs: Whole
    kan_backend: str
    versions: dict[str, str]
    hardware: Hardware
    config_hash: str
    data_hash: dict[str, str]


class Results(TypedDict):
    """All of results.json."""

    domains: Annotated[list[str], Field(min_length=1)]
    arms: Annotated[dict[str, Arm], Field(min_length=1)]
    comparisons: list[Comparison]
    references: dict[str, References]
    provenance: Provenance
    notes: list[Note]
    records: Annotated[list[Record], Field(min_length=1)]
