"""Tables of a study's results, for the terminal and the page alike."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from kanlm.reporting.format import MISSING, count, duration, fixed, signed, significant, span
from kanlm.reporting.notes import Notes
from kanlm.reporting.study import stage_count
from kanlm.reporting.summary import findings
from kanlm.reporting.sweep_table import sweep_tables
from kanlm.reporting.terminal import Table, print_table
from kanlm.results.read import read_results

DIFFERENCES = "Differences"
#: What an interval says; how often it is right was simulated (kanlm/evaluation/statistics.py).
INTERVAL = (
    "Intervals are over documents (of a text in one piece, blocks of 2,048 characters): the middle "
    "95% of a bootstrap's resamples, which holds the truth about 9 times in 10 where 40 to 400 "
    "documents are of very uneven length. Seeds are not in them."
)
#: Arms of which every pair is shown.
ALL_PAIRS = 4


def result_tables(results: Mapping[str, Any]) -> list[Table]:
    """Make all tables that compare the arms of a study."""
    differences = difference_table(results)
    tables = [quality_table(results), *([differences] if differences else [])]
    if stage_count(results) > 1:
        tables += [forgetting_table(results), transfer_table(results)]
    return [*tables, cost_table(results)]


def quality_table(results: Mapping[str, Any]) -> Table:
    """Tabulate bits per byte with interval and range over seeds, and perplexities, after stage 0.

    One row an arm, and below the references; with one stage, for every domain measured. A
    row's notes are marked beside its figure and stand below, after those on the text itself.
    """
    domains = results["domains"]
    shown = domains if stage_count(results) == 1 else domains[:1]
    several_seeds = any(len(arm["seeds"]) > 1 for arm in results["arms"].values())
    alike = len({len(arm["seeds"]) for arm in results["arms"].values()}) == 1
    notes = Notes(results)
    rows: list[list[str]] = []
    rules: list[int] = []
    for domain in shown:
        j = domains.index(domain)
        prefix = [domain] if len(shown) > 1 else []
        references = results["references"].get(domain, {})
        for name, arm in results["arms"].items():
            by_seed = [seed[0][j] for seed in arm["bits_per_byte_by_seed"]]
            value = arm["bits_per_byte"][0][j]
            row = [
                fixed(value),
                notes.mark(name, domain),
                span(arm["bits_per_byte_interval"][0][j]),
                _seeds(by_seed),
                "" if alike else str(len(arm["seeds"])),
                _ratio(value, references.get("bigram")),
                significant(arm["perplexity"][0][j]),
                significant(arm["word_perplexity"][0][j]),
            ]
            rows.append([name, *prefix, *row])
        for name in ("bigram", "xz"):
            if name in references:
                ratio = _ratio(references[name], references.get("bigram"))
                rows.append([name, *prefix, fixed(references[name]), "", "", "", "", ratio, "", ""])
        rules.append(len(rows))
    split = results["records"][0]["split"]
    text = "held-out text" if len(shown) > 1 else shown[0]
    text += " after pretraining" if shown != domains else ""
    return _without_empty_columns(
        Table(
            title=f"Prediction of {text}, {split} split",
            columns=[
                "arm",
                *(["domain"] if len(shown) > 1 else []),
                "bits per byte",
                "note",
                "interval",
                "range over seeds",
                "seeds",
                "× bigram",
                "perplexity by token",
                "by word",
            ],
            rows=rows,
            note=f"Lower is better. {INTERVAL}"
            + ("" if several_seeds else " One seed: how much seeds vary is not known."),
            rules=rules[:-1],
            footnotes=[*_scored(results, shown), *notes.lines(shown)],
            names=1 + (len(shown) > 1),
        )
    )


def _scored(results: Mapping[str, Any], domains: Sequence[str]) -> list[str]:
    """Say how much text the figures are of."""
    sizes = {record["domain"]: record["bytes"] for record in results["records"]}
    scored = [f"{count(sizes[name], 'B')} of {name}" for name in domains if name in sizes]
    return [f"Scored: {', '.join(scored)}."]


def difference_table(results: Mapping[str, Any]) -> Table | None:
    """Tabulate arms side by side, paired by document and seed; None for a single arm.

    After pretraining on the first domain, and at the end on all of them. Every two arms, or,
    where there are more than ALL_PAIRS, each beside the first.
    """
    first = next(iter(results["arms"]))
    all_pairs = len(results["arms"]) <= ALL_PAIRS
    last = stage_count(results) - 1
    rows: list[list[str]] = []
    rules: list[int] = []
    cells = [(0, results["domains"][0]), *((last, domain) for domain in results["domains"])]
    for stage, domain in dict.fromkeys(cells):
        pairs = [
            pair
            for pair in results["comparisons"]
            if (pair["stage"], pair["domain"]) == (stage, domain)
            and (all_pairs or pair["arm"] == first)
        ]
        when = ", after pretraining" if stage < last else ", at the end" if last else ""
        rows += [
            [
                f"{pair['arm']} − {pair['other']}",
                f"{domain}{when}",
                signed(pair["difference"]),
                span(pair["difference_interval"]),
                _seeds(pair["difference_by_seed"]),
            ]
            for pair in pairs
        ]
        rules.append(len(rows))
    if not rows:
        return None
    return _without_empty_columns(
        Table(
            title=f"{DIFFERENCES}, {results['records'][0]['split']} split",
            columns=["arms", "on", "bits per byte", "interval", "range over seeds"],
            rows=rows,
            note="Negative: the first arm is better. Paired by document, so two arms can be apart "
            "although their own intervals overlap."
            + ("" if all_pairs else f" results.json has all pairs; here each beside {first}."),
            rules=rules[:-1],
            names=2,
        )
    )


def cost_table(results: Mapping[str, Any]) -> Table:
    """Tabulate what each arm is made of and what it took to train."""
    labels = "".join(
        f"{name} is {arm['feed_forward']}. "
        for name, arm in results["arms"].items()
        if name != arm["feed_forward"]
    )
    rows = [
        [
            name,
            count(arm["parameters"]),
            count(arm["feed_forward_parameters"]),
            count(arm["flops_per_token"]),
            count(arm["train_tokens"]),
            duration(arm["train_seconds"]),
            duration(arm["compile_seconds"]) if arm.get("compile_seconds") else "",
            count(arm["tokens_per_second"]),
            count(arm["peak_memory_bytes"], "B"),
        ]
        for name, arm in results["arms"].items()
    ]
    return _without_empty_columns(
        Table(
            title="Size and cost",
            columns=[
                "arm",
                "params",
                "FFN params",
                "FLOPs a token",
                "tokens trained",
                "training time",
                "of it compiling",
                "tokens/s",
                "peak memory",
            ],
            rows=rows,
            note=f"{labels}FFN is feed-forward. FLOPs are of a forward pass.{_sharing(results)}",
        )
    )


def _sharing(results: Mapping[str, Any]) -> str:
    """Say what to know of times where runs shared the machine."""
    several = results["provenance"].get("parallel_runs", 1)
    if several == 1:
        return ""
    return (
        f" Up to {several} runs at a time shared the machine: times and tokens/s are those of "
        "a part of it, and compare arms only roughly."
    )


def forgetting_table(results: Mapping[str, Any]) -> Table:
    """Tabulate losses by arm and domain: before, learned and final, gain and forgetting."""
    domains = results["domains"]
    stages = stage_count(results)
    rows, rules = [], []
    notes = Notes(results)
    for name, arm in results["arms"].items():
        matrix = arm["bits_per_byte"]
        for j, domain in enumerate(domains[:stages]):
            lost = [seed.get(domain) for seed in arm["forgetting_by_seed"]]
            rows.append(
                [
                    name,
                    domain,
                    notes.mark(name, domain),
                    fixed(matrix[j - 1][j]) if j else "",
                    fixed(matrix[j][j]),
                    fixed(matrix[stages - 1][j]),
                    fixed(arm["learning_gain"][domain]) if j else "",
                    signed(arm["forgetting"][domain]) if j < stages - 1 else "",
                    _seeds(lost) if j < stages - 1 else "",
                ]
            )
        rules.append(len(rows))
    return _without_empty_columns(
        Table(
            title=f"Learning and forgetting, {' → '.join(domains[:stages])}",
            columns=[
                "arm",
                "domain",
                "note",
                "before",
                "learned",
                "final",
                "gain",
                "forgetting",
                "over seeds",
            ],
            rows=rows,
            note=f"Bits per byte, {results['records'][0]['split']} split. Models that learn less "
            "forget less: read forgetting beside gain.",
            rules=rules[:-1],
            footnotes=[*_scored(results, domains[:stages]), *notes.lines(domains[:stages])],
            names=2,
        )
    )


def transfer_table(results: Mapping[str, Any]) -> Table:
    """Tabulate one figure an arm for the whole sequence of domains."""
    several = stage_count(results) > 2
    rows = []
    for name, arm in results["arms"].items():
        row = [name, fixed(arm["average_final_loss"]), signed(arm["backward_transfer"])]
        if several:
            row += [
                signed(_mean(arm["forgetting_from_best"].values())),
                signed(_mean(list(arm["forward_transfer"].values())[1:])),
            ]
        rows.append(row)
    columns = ["arm", "average final loss", "backward transfer"]
    if several:
        columns += ["forgetting from best", "forward transfer"]
    return _without_empty_columns(
        Table(
            title="Over all domains",
            columns=columns,
            rows=rows,
            note=f"Bits per byte, {results['records'][0]['split']} split, means over domains; "
            "transfer is positive where it helped.",
        )
    )


def accounting_tables(accounts: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Tabulate parameters, and forward FLOPs of a token, by part, one row an arm.

    Args:
        accounts: arm → `parameters` and `flops_per_token` by part, `active_parameters` and
            `decoded_parameters`.
    """
    parameters = _by_part(accounts, "parameters")
    flops = _by_part(accounts, "flops_per_token")
    return [
        Table(
            title="Parameters, by part",
            columns=["arm", *parameters, "active"],
            rows=[
                [name, *(f"{parameters[part][name]:,}" for part in parameters), f"{active:,}"]
                for name, active in _column(accounts, "active_parameters")
            ],
            note="Active are all but those of experts that a token is not sent to.",
        ),
        Table(
            title="What a token costs: FLOPs by part, and weights read to decode it, in fp32",
            columns=["arm", *flops, "read"],
            rows=[
                [name, *(count(flops[part][name]) for part in flops), count(4 * read, "B")]
                for name, read in _column(accounts, "decoded_parameters")
            ],
            note="A multiply-add is two FLOPs. Attention scores are those of a full context.",
        ),
    ]


def _by_part(accounts: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, dict[str, int]]:
    """Map part → arm → figure, 0 where an arm has no such part; the total last."""
    parts = dict.fromkeys(part for account in accounts.values() for part in account[key])
    ordered = sorted(parts, key=lambda part: part == "total")
    return {
        part.replace("_", " "): {
            name: account[key].get(part, 0) for name, account in accounts.items()
        }
        for part in ordered
    }


def _column(accounts: Mapping[str, Mapping[str, Any]], key: str) -> list[tuple[str, int]]:
    return [(name, account[key]) for name, account in accounts.items()]


# The terminal


def print_results(path: Path) -> None:
    """Print the tables and the finding of a results.json."""
    results = read_results(path)
    quality, *rest = result_tables(results)
    for table in (quality, *sweep_tables(results), *rest):
        # Its rows are too many and too wide here; the finding and the page say it.
        if not table.title.startswith(DIFFERENCES):
            print_table(table)
    console = Console(highlight=False)
    for sentence in findings(results):
        console.print()
        console.print(sentence, markup=False)


def print_accounting(accounts: Mapping[str, Any]) -> None:
    """Print arm → accounting, dataclasses with the fields of `kanlm.model.accounting`."""
    for table in accounting_tables({name: asdict(each) for name, each in accounts.items()}):
        print_table(table)


# Helpers


def _without_empty_columns(table: Table) -> Table:
    """Leave out columns of which nothing is known, such as the range over a single seed."""
    kept = [
        index
        for index in range(len(table.columns))
        if any(row[index] not in ("", MISSING) for row in table.rows)
    ]
    columns = [table.columns[index] for index in kept]
    rows = [[row[index] for index in kept] for row in table.rows]
    return replace(table, columns=columns, rows=rows)


def _ratio(value: float | None, reference: float | None) -> str:
    return fixed(value / reference, 2) if value is not None and reference else ""


def _range(values: Sequence[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return [min(known), max(known)] if known else None


def _seeds(values: Sequence[float | None]) -> str:
    """Format the range over seeds, empty for a single one."""
    return span(_range(values)) if len(values) > 1 else ""


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
