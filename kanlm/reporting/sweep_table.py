"""Tables of what each arm of a sweep tried."""

from collections.abc import Mapping
from typing import Any

from kanlm.reporting.format import fixed, setting_value, short_names
from kanlm.reporting.notes import edge_warning
from kanlm.reporting.terminal import CHOSEN, Table
from kanlm.results.sweep import setting_values


def sweep_tables(results: Mapping[str, Any]) -> list[Table]:
    """Tabulate the validation loss of every trial; none without a sweep.

    Arms that tried the same settings stand side by side in one table; others in one each.
    """
    swept = {name: arm["sweep"] for name, arm in results["arms"].items() if "sweep" in arm}
    groups: dict[str, list[str]] = {}
    for name, sweep in swept.items():
        tried = str([trial["settings"] for trial in sweep["trials"]])
        groups.setdefault(tried, []).append(name)
    return [_table({arm: swept[arm] for arm in arms}) for arms in groups.values()]


def _table(sweeps: Mapping[str, Mapping[str, Any]]) -> Table:
    """Tabulate arms that tried the same: a row a trial, a column an arm."""
    (first, *_) = sweeps.values()
    settings = list(setting_values(first["trials"]))
    rows = [
        [
            *(setting_value(trial["settings"][name]) for name in settings),
            *(_cell(sweep["trials"][i]) for sweep in sweeps.values()),
        ]
        for i, trial in enumerate(first["trials"])
    ]
    warnings = {arm: edge_warning(sweep) for arm, sweep in sweeps.items()}
    return Table(
        title=f"Trials{'' if len(sweeps) > 1 else ' of ' + next(iter(sweeps))}: bits per byte of "
        f"{first['domain']}, {first['split']} split",
        columns=[*short_names(settings).values(), *sweeps],
        rows=rows,
        note=f"{CHOSEN} is chosen: the least. Seed {first['seed']}, of the model that the trial "
        "ended with. One seed: trials closer than seeds are apart are not told apart.",
        footnotes=[f"{arm}: {warning}" for arm, warning in warnings.items() if warning],
        names=len(settings),
    )


def _cell(trial: Mapping[str, Any]) -> str:
    if trial["state"] == "diverged":
        return "diverged"
    return (
        f"{CHOSEN} {fixed(trial['bits_per_byte'])}"
        if trial["chosen"]
        else fixed(trial["bits_per_byte"])
    )
