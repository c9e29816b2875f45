"""Whether what results.json holds fits together, once its types are right."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kanlm.results.sweep import edges


def problem(results: Mapping[str, Any]) -> str | None:
    """Say what does not fit together, or contradicts the records; None if all does."""
    return _misshapen(results) or _contradiction(results) or _sweep_contradiction(results)


def _misshapen(results: Mapping[str, Any]) -> str | None:
    """Say what of checked types does not fit together; None if all does."""
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
    """Say which figure is not the one that its records give; None if all are."""
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
    """Say which choice of a sweep its trials do not give; None if they give all."""
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
    """Return shapes of an arm's matrices."""
    matrix = (stages, domains)
    return {
        "bits_per_byte": matrix,
        "bits_per_byte_by_seed": (seeds, *matrix),
        "bits_per_byte_interval": matrix,
        "perplexity": matrix,
        "word_perplexity": matrix,
    }


def _shape(nested: Sequence[Any], depth: int) -> tuple[int, ...] | None:
    """Return shape of nested lists to a depth; None where they are uneven."""
    if depth == 1:
        return (len(nested),)
    inner = {_shape(each, depth - 1) for each in nested}
    if len(inner) != 1:
        return None
    (one,) = inner
    return None if one is None else (len(nested), *one)


def _names(domains: Sequence[str], stages: int) -> dict[str, list[str]]:
    """Return domains of an arm's figures by domain, in order."""
    before, learned = list(domains[: stages - 1]), list(domains[1:stages])
    return {
        "forgetting": before,
        "forgetting_by_seed": before,
        "forgetting_from_best": before,
        "learning_gain": learned,
        "learning_gain_by_seed": learned,
        "forward_transfer": learned,
    }
