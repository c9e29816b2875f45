"""From the runs of a study to its results.json.

Nothing is measured here: the records, sums by document and facts of each run are read
from its folder, given their place in the study, and put together.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kanlm.config import Config
from kanlm.evaluation.perplexity import Evaluation
from kanlm.experiments.provenance import collect as collect_provenance
from kanlm.experiments.results import (
    Place,
    Record,
    derive,
    read_documents,
    read_records,
    write_results,
)
from kanlm.experiments.study import Run


def collect(config: Config, runs: Sequence[Run]) -> Path:
    """Write results.json and documents.jsonl of finished runs into the study's folder."""
    folder = Path(config.output_dir)
    records: list[Record] = []
    documents: dict[Place, Evaluation] = {}
    for run in runs:
        records += [
            Record(**{**asdict(record), **_place(run)})
            for record in read_records(run.folder / "results.json")
        ]
        for place, evaluation in read_documents(run.folder / "documents.jsonl").items():
            documents[replace(place, **_place(run))] = evaluation
    outcomes = [json.loads((run.folder / "results.json").read_text()) for run in runs]
    by_seed: dict[str, dict[int, list[Any]]] = {}
    for outcome, run in zip(outcomes, runs, strict=True):
        facts = next(iter(outcome["arms"].values()))
        by_seed.setdefault(run.arm, {}).setdefault(run.seed, []).append(facts)
    arms = {name: combine_facts(list(seeds.values())) for name, seeds in by_seed.items()}
    references, data_hash = _of_domains(outcomes)
    results = derive(
        records,
        arms,
        domains=list(dict.fromkeys([run.domain for run in runs] + [r.domain for r in records])),
        documents=documents,
        references=references,
        provenance={
            **collect_provenance(config, data_hash),
            # Of the runs, which may have had fewer threads than this process.
            "hardware": outcomes[0]["provenance"]["hardware"],
        },
        resamples=config.evaluation.bootstrap_resamples,
    )
    write_results(folder, results, documents)
    return folder


def _place(run: Run) -> dict[str, Any]:
    return {"arm": run.arm, "seed": run.seed, "strategy": "plain", "stage": run.stage}


def combine_facts(by_seed: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """An arm's facts from those of its runs, [seed][stage].

    Tokens and seconds are what one seed took for all stages, on average over seeds, so that
    more seeds do not make an arm look dearer. Memory is the largest of all.
    """
    facts = [fact for stages in by_seed for fact in stages]
    tokens = round(sum(fact["train_tokens"] for fact in facts) / len(by_seed))
    seconds = sum(fact["train_seconds"] for fact in facts) / len(by_seed)
    # Runs of before this was counted have none.
    compiling = sum(fact.get("compile_seconds", 0.0) for fact in facts) / len(by_seed)
    kept = ("feed_forward", "parameters", "feed_forward_parameters", "flops_per_token")
    return {
        **{name: facts[0][name] for name in (*kept, "bytes_per_decoded_token", "accounting")},
        "train_tokens": tokens,
        "train_seconds": seconds,
        "compile_seconds": compiling,
        "tokens_per_second": tokens / seconds,
        "peak_memory_bytes": max(fact["peak_memory_bytes"] for fact in facts),
    }


def _of_domains(outcomes: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """References and fingerprints by domain; all runs have the same."""
    references: dict[str, Any] = {}
    data_hash: dict[str, str] = {}
    for outcome in outcomes:
        references |= outcome["references"]
        data_hash |= outcome["provenance"]["data_hash"]
    return references, data_hash
