"""What results.json and metrics.jsonl hold, checked as they are read.

The files may have been cut off, damaged or made up: what reports and studies take from them
is then of the right type and shape, or a line says what is not.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

# pydantic takes no other before Python 3.12.
from typing_extensions import NotRequired, TypedDict  # noqa: UP035

from kanlm.config.checking import check
from kanlm.errors import UserError
from kanlm.reading import parse_object, read_bytes, read_object
from kanlm.reporting.sweep import LARGEST, edges

SCHEMA_VERSION = 2

Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Whole = Annotated[int, Field(ge=0, lt=2**63)]
Quantity = Annotated[float, Field(ge=0, le=LARGEST)]
#: [stage][domain]; null where nothing was measured.
Matrix = list[list[Number | None]]
#: The same of perplexities, which may be as large as a number can be.
Perplexities = list[list[float | None]]
#: By domain.
Named = dict[str, Number | None]


class Accounting(TypedDict):
    """Of `kanlm.model.accounting`, what tables show."""

    parameters: dict[str, Whole]
    flops_per_token: dict[str, Whole]
    active_parameters: Whole
    decoded_parameters: Whole


class Validation(TypedDict):
    """Best of a run's."""

    nats_per_token: Number | None
    step: Whole


class Trial(TypedDict):
    """One trial of a sweep, with the validation loss of the model that it ended with."""

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


class Arm(TypedDict):
    """An arm's facts and what is derived from its records."""

    feed_forward: str
    parameters: Whole | None
    feed_forward_parameters: Whole | None
    flops_per_token: Quantity | None
    train_tokens: Whole | None
    train_seconds: Quantity | None
    compile_seconds: NotRequired[Quantity | None]
    tokens_per_second: Quantity | None
    peak_memory_bytes: Whole | None
    steps: Whole | None
    skipped_steps: Whole | None
    sweep: NotRequired[Sweep]
    bytes_per_decoded_token: NotRequired[Quantity | None]
    best_validation: NotRequired[Validation]
    accounting: NotRequired[Accounting]
    seeds: Annotated[list[Whole], Field(min_length=1)]
    bits_per_byte: Matrix
    bits_per_byte_by_seed: list[Matrix]
    bits_per_byte_interval: list[list[tuple[Number, Number] | None]]
    perplexity: Perplexities
    word_perplexity: Perplexities
    average_final_loss: Number | None
    forgetting: Named
    forgetting_by_seed: list[Named]
    forgetting_from_best: Named
    learning_gain: Named
    learning_gain_by_seed: list[Named]
    forward_transfer: Named
    backward_transfer: Number | None


class RunFacts(TypedDict):
    """What a single run knows of its arm, and a study adds up."""

    parameters: Whole
    feed_forward_parameters: Whole
    flops_per_token: Quantity
    train_tokens: Whole
    train_seconds: Annotated[Quantity, Field(gt=0)]
    compile_seconds: NotRequired[Quantity]
    peak_memory_bytes: Whole
    steps: Whole
    skipped_steps: Whole
    bytes_per_decoded_token: Quantity
    best_validation: Validation
    accounting: Accounting


class Comparison(TypedDict):
    """Two arms after one stage on one domain."""

    arm: str
    other: str
    stage: Whole
    domain: str
    difference: Number
    difference_by_seed: Annotated[list[Number], Field(min_length=1)]
    difference_interval: tuple[Number, Number] | None


class References(TypedDict, total=False):
    """Bits per byte of a bigram and of xz, with what they were made of."""

    bigram: Number
    bigram_discount: Number
    bigram_training_tokens: Whole
    xz: Number
    xz_training_bytes: Whole
    xz_heldout_bytes: Whole


class Hardware(TypedDict):
    """Machine of a result."""

    platform: str
    cpu: str
    cores: Whole | None
    threads: Whole
    memory_bytes: Whole
    gpus: list[str]


class Provenance(TypedDict, total=False):
    """What a result was made with."""

    commit: str | None
    dirty: bool | None
    parallel_runs: Whole
    versions: dict[str, str]
    hardware: Hardware
    config_hash: str
    data_hash: dict[str, str]


class Record(TypedDict):
    """One evaluation: sums over a split."""

    arm: str
    seed: Whole
    strategy: str
    stage: Whole
    domain: str
    step: Whole
    split: str
    nats: Number
    tokens: Annotated[Whole, Field(gt=0)]
    words: Whole
    bytes: Annotated[Whole, Field(gt=0)]


class Note(TypedDict):
    """What a reader must know of figures: of an arm or all, on a domain or all (None)."""

    arm: str | None
    domain: str | None
    note: str


class Results(TypedDict):
    """All of results.json."""

    domains: Annotated[list[str], Field(min_length=1)]
    arms: Annotated[dict[str, Arm], Field(min_length=1)]
    comparisons: list[Comparison]
    references: dict[str, References]
    provenance: Provenance
    notes: list[Note]
    records: Annotated[list[Record], Field(min_length=1)]


def read_results(path: Path) -> dict[str, Any]:
    """Read results.json. A single run's is that of a study of one arm with one stage.

    Raises:
        UserError: it cannot be read, is of another version, or holds something else.
    """
    results = read_object(path)
    version = results.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema_version is {version!r}, expected {SCHEMA_VERSION}: another version "
            "of kanlm wrote it; read it with that one, or make it anew"
        )
    check(Results, results, str(path))
    problem = _misshapen(results) or _contradiction(results) or _sweep_contradiction(results)
    if problem is not None:
        raise UserError(f"{path} is damaged: {problem}")
    return results


def read_run_results(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a single run's results.json, and of that the facts of its one arm, none unknown.

    Raises:
        UserError: as of `read_results`, or it is a study's, or a fact is missing.
    """
    results = read_results(path)
    if len(results["arms"]) != 1:
        raise UserError(f"{path} holds {len(results['arms'])} arms: it is not a single run's")
    [(name, facts)] = results["arms"].items()
    check(RunFacts, facts, f"{path}.arms.{name}")
    return results, facts


def _misshapen(results: Mapping[str, Any]) -> str | None:
    """What of checked types does not fit together, in words."""
    domains, arms = results["domains"], results["arms"]
    if len(set(domains)) < len(domains):
        return "two domains have one name"
    stages = {len(arm["bits_per_byte"]) for arm in arms.values()}
    if len(stages) > 1 or not 0 < min(stages) <= len(domains):
        return f"bits_per_byte has {' and '.join(map(str, sorted(stages)))} stages"
    (count,) = stages
    for name, arm in arms.items():
        for key, expected in _shapes(count, len(domains), len(arm["seeds"])).items():
            if _shape(arm[key], len(expected)) != expected:
                return f"arms.{name}.{key} does not have the shape {expected}"
        for key, named in _names(domains, count).items():
            by_seed = arm[key] if key.endswith("_by_seed") else [arm[key]] * len(arm["seeds"])
            if [list(each) for each in by_seed] != [named] * len(arm["seeds"]):
                return f"arms.{name}.{key} is not by domain {named}"
    for pair in results["comparisons"]:
        if pair["arm"] == pair["other"] or not {pair["arm"], pair["other"]} <= arms.keys():
            return f"comparisons: no arms {pair['arm']} and {pair['other']}"
    for note in results["notes"]:
        if note["arm"] not in (None, *arms):
            return f"notes: no arm {note['arm']}"
        if note["domain"] not in (None, *domains):
            return f"notes: no domain {note['domain']}"
    return None


def _contradiction(results: Mapping[str, Any]) -> str | None:
    """A figure that is not the one its records give, as after a digit has changed."""
    domains, arms = results["domains"], results["arms"]
    last: dict[tuple[str, int, int, str], float] = {}
    for record in sorted(results["records"], key=lambda record: record["step"]):
        bits = record["nats"] / record["bytes"] / math.log(2)
        last[record["arm"], record["seed"], record["stage"], record["domain"]] = bits
    for name, arm in arms.items():
        by_seed, mean = arm["bits_per_byte_by_seed"], arm["bits_per_byte"]
        for stage, row in enumerate(mean):
            for j, domain in enumerate(domains):
                cells = [matrix[stage][j] for matrix in by_seed]
                found = [last.get((name, seed, stage, domain)) for seed in arm["seeds"]]
                if not all(map(_alike, cells, found)):
                    return f"bits_per_byte_by_seed of {name} on {domain} is not that of records"
                if None not in cells and not _alike(row[j], sum(cells) / len(cells)):
                    return f"bits_per_byte of {name} on {domain} is no mean over seeds"
    for pair in results["comparisons"]:
        by_seed = pair["difference_by_seed"]
        if not _alike(pair["difference"], sum(by_seed) / len(by_seed)):
            return f"the difference of {pair['arm']} and {pair['other']} is no mean over seeds"
    return None


def _sweep_contradiction(results: Mapping[str, Any]) -> str | None:
    """A choice that the trials do not give."""
    for name, arm in results["arms"].items():
        if "sweep" not in arm:
            continue
        where, trials = f"arms.{name}.sweep", arm["sweep"]["trials"]
        if arm["sweep"]["domain"] not in results["domains"]:
            return f"{where}: no domain {arm['sweep']['domain']}"
        if len({tuple(trial["settings"]) for trial in trials}) > 1:
            return f"{where}: trials of different settings"
        for trial in trials:
            if (trial["bits_per_byte"] is None) != (trial["state"] == "diverged"):
                return f"{where}: a trial has a loss if it did not diverge, and only then"
        known = [t["bits_per_byte"] for t in trials if t["bits_per_byte"] is not None]
        if [t["bits_per_byte"] for t in trials if t["chosen"]] != [min(known, default=None)]:
            return f"{where}: the chosen trial is not that of least loss"
        if arm["sweep"]["edges"] != edges(trials):
            return f"{where}: edges are not those of the trials"
    return None


def _alike(figure: float | None, expected: float | None) -> bool:
    """Whether two figures are the same but for rounding; one that is not known says nothing."""
    if figure is None or expected is None:
        return figure is None
    return math.isclose(figure, expected, rel_tol=1e-9, abs_tol=1e-9)


def _shapes(stages: int, domains: int, seeds: int) -> dict[str, tuple[int, ...]]:
    """Shapes of an arm's matrices."""
    matrix = (stages, domains)
    return {
        "bits_per_byte": matrix,
        "bits_per_byte_by_seed": (seeds, *matrix),
        "bits_per_byte_interval": matrix,
        "perplexity": matrix,
        "word_perplexity": matrix,
    }


def _shape(nested: Sequence[Any], depth: int) -> tuple[int, ...] | None:
    """Shape of nested lists to a depth; None where they are uneven."""
    if depth == 1:
        return (len(nested),)
    inner = {_shape(each, depth - 1) for each in nested}
    if len(inner) != 1:
        return None
    (one,) = inner
    return None if one is None else (len(nested), *one)


def _names(domains: Sequence[str], stages: int) -> dict[str, list[str]]:
    """Domains of an arm's figures by domain, in order."""
    before, learned = list(domains[: stages - 1]), list(domains[1:stages])
    return {
        "forgetting": before,
        "forgetting_by_seed": before,
        "forgetting_from_best": before,
        "learning_gain": learned,
        "learning_gain_by_seed": learned,
        "forward_transfer": learned,
    }


# metrics.jsonl

#: What is shown of a line, by its kind, and of which types that is.
_SHOWN: dict[str, dict[str, type]] = {
    "train": {"bits_per_byte": float},
    "validation": {"domain": str, "bits_per_byte": float},
    "sample": {"prompt": str, "text": str},
}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl; what a kill has left behind the last whole one is none.

    A loss that is no finite number is NaN, which a curve leaves out.

    Raises:
        UserError: the file cannot be read, or a whole line is none that a run writes.
    """
    *lines, _ = read_bytes(path).split(b"\n")
    for number, text in enumerate(lines, 1):
        try:
            yield _line(text)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None


def _line(text: bytes) -> dict[str, Any]:
    try:
        line = parse_object(text, finite=False)
    except ValueError:
        raise ValueError("expected a JSON object") from None
    if not isinstance(line.get("kind"), str):
        raise ValueError("expected a kind")
    step = line.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**53:
        raise ValueError("expected a step, a whole number")
    for name, kind in _SHOWN.get(line["kind"], {}).items():
        value = line.get(name)
        if kind is float:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"expected a number for {name}")
            line[name] = float(value) if abs(value) <= LARGEST else math.nan
        elif not isinstance(value, kind):
            raise ValueError(f"expected text for {name}")
    return line
