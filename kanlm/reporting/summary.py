"""What a study found, in sentences that claim no more than its numbers carry.

Two arms are called apart only where the paired interval over documents leaves out zero
and every seed has the same sign. One seed shows two trained models, not two
architectures, and the sentence says so. Where a model is behind what has learned nothing but
pairs of tokens, or behind a compressor, the first sentence says that, too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from kanlm.reporting.format import fixed, setting_value, signed, span
from kanlm.reporting.study import stage_count

#: Reference → what it is, for whom it is ahead of a model.
REFERENCES = {
    "bigram": "a bigram, which knows pairs of tokens alone",
    "xz": "xz, which has the training text before it",
}
FURTHER = {"smallest": "smaller", "largest": "larger"}


def findings(results: Mapping[str, Any]) -> list[str]:
    """State the main finding; then forgetting, where domains were learned in sequence.

    Last, which choices of a sweep lie at the edge of what was tried.
    """
    sentences = [" ".join([_prediction(results), *_behind(results)])]
    if stage_count(results) > 1:
        sentences.append(_forgetting(results))
    return sentences + _edges(results)


def _behind(results: Mapping[str, Any]) -> list[str]:
    """Say which arms predict the first domain worse than a reference does."""
    domain = results["domains"][0]
    references = results["references"].get(domain, {})
    losses = {name: arm["bits_per_byte"][0][0] for name, arm in results["arms"].items()}
    sentences = []
    for reference, what in REFERENCES.items():
        figure = references.get(reference)
        worse = [n for n, loss in losses.items() if None not in (loss, figure) and loss > figure]
        if worse:
            who = "All arms are" if len(worse) == len(losses) > 1 else f"{listed(worse)} "
            who += "" if who.startswith("All") else "is" if len(worse) == 1 else "are"
            sentences.append(f"{who} behind {what} ({fixed(figure)}).")
    return sentences


def _edges(results: Mapping[str, Any]) -> list[str]:
    """Write a sentence an edge: the arms whose choice lies there."""
    arms: dict[tuple[str, str], list[str]] = {}
    for name, arm in results["arms"].items():
        for edge in arm.get("sweep", {"edges": []})["edges"]:
            at = arms.setdefault((edge["edge"], edge["setting"]), [])
            at.append(f"{name} ({setting_value(edge['value'])})")
    return [
        f"At the edge of what was tried: the {edge} {setting} of its grid was best for "
        f"{listed(names)}. A {FURTHER[edge]} one was not tried and may be better."
        for (edge, setting), names in arms.items()
    ]


def listed(names: Sequence[str]) -> str:
    """Join names: a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _prediction(results: Mapping[str, Any]) -> str:
    domain = results["domains"][0]
    losses = {name: arm["bits_per_byte"][0][0] for name, arm in results["arms"].items()}
    ranked = sorted(
        (name for name in losses if losses[name] is not None), key=lambda name: losses[name]
    )
    if not ranked:
        return f"No loss on {domain} was a finite number."
    best = ranked[0]
    if len(ranked) == 1:
        return f"{best} predicts {domain} at {fixed(losses[best])} bits per byte."
    second = ranked[1]
    figures = f"{fixed(losses[best])} against {fixed(losses[second])} bits per byte"
    compared = _difference(results, second, best)
    if compared is None:
        return f"On {domain}, {best} and {second} share no seed: {figures}."
    difference, by_seed, interval = compared
    evidence = f"difference {fixed(difference)}, interval over documents {span(interval)}"
    same_sign = sum(value > 0 for value in by_seed)
    seeds = len(by_seed)
    apart = interval is not None and interval[0] > 0
    if seeds == 1:
        verdict = "is ahead of" if apart else "is level with"
        return (
            f"On {domain}, {best} {verdict} {second}: {figures} ({evidence}). "
            "One seed each: how much of it is seed noise is not known."
        )
    counted = f"{best} better in {same_sign} of {seeds} seeds"
    if apart and same_sign == seeds:
        return f"On {domain}, {best} is ahead of {second}: {figures} ({evidence}; {counted})."
    return (
        f"On {domain}, {best} and {second} are not told apart: {figures} ({evidence}; {counted})."
    )


def _forgetting(results: Mapping[str, Any]) -> str:
    domains = results["domains"][: stage_count(results)]
    lost = {
        name: -arm["backward_transfer"]
        for name, arm in results["arms"].items()
        if arm["backward_transfer"] is not None
    }
    if not lost:
        return "Forgetting was not measured."
    ranked = sorted(lost, key=lambda name: lost[name])
    after = f"After {listed(domains[1:])}"
    gains = {name: _mean_gain(results, name) for name in ranked}
    if len(ranked) == 1:
        name = ranked[0]
        return (
            f"{after}, {name} lost {signed(lost[name])} bits per byte on what it knew and "
            f"gained {fixed(gains[name])} on what was new."
        )
    best, second = ranked[:2]
    level = signed(lost[best]) == signed(lost[second])
    verdict = f"forgot no less than {second}" if level else "forgot least"
    sentence = (
        f"{after}, {best} {verdict}: {signed(lost[best])} bits per byte against "
        f"{signed(lost[second])} for {second}, having gained {fixed(gains[best])} against "
        f"{fixed(gains[second])}"
    )
    agreeing, seeds = _agreeing_seeds(results, best, second)
    if seeds == 0:
        sentence += "; they share no seed"
    elif seeds == 1:
        sentence += "; one seed each, so seed noise is not known"
    elif agreeing < seeds:
        sentence += f"; seeds disagree ({agreeing} of {seeds}), so the order is not settled"
    else:
        sentence += f"; the same order in each of {seeds} seeds"
    gain, other = gains[best], gains[second]
    if gain is not None and other is not None and gain < other:
        sentence += f". It also learned less than {second}, which alone makes forgetting smaller"
    return sentence + "."


def _difference(
    results: Mapping[str, Any], arm: str, other: str
) -> tuple[float, list[float], list[float] | None] | None:
    """Return arm − other on the first domain after stage 0: mean, by seed, interval.

    None where they were not compared.
    """
    for pair in results["comparisons"]:
        if (pair["stage"], pair["domain"]) != (0, results["domains"][0]):
            continue
        interval = pair["difference_interval"]
        if (pair["arm"], pair["other"]) == (arm, other):
            return pair["difference"], pair["difference_by_seed"], interval
        if (pair["arm"], pair["other"]) == (other, arm):
            turned = [-end for end in reversed(interval)] if interval else None
            return -pair["difference"], [-v for v in pair["difference_by_seed"]], turned
    return None


def _mean_gain(results: Mapping[str, Any], name: str) -> float | None:
    """Return the mean gain over domains; None where one was not measured."""
    gains = list(results["arms"][name]["learning_gain"].values())
    return None if None in gains else sum(gains) / len(gains)


def _agreeing_seeds(results: Mapping[str, Any], best: str, second: str) -> tuple[int, int]:
    """Count the seeds that both arms have, and those in which `best` forgot less."""
    by_seed = [
        {
            seed: sum(lost.values())
            for seed, lost in zip(arm["seeds"], arm["forgetting_by_seed"], strict=True)
            if None not in lost.values()
        }
        for arm in (results["arms"][best], results["arms"][second])
    ]
    shared = by_seed[0].keys() & by_seed[1].keys()
    return sum(by_seed[0][seed] < by_seed[1][seed] for seed in shared), len(shared)
