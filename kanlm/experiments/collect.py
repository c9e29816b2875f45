"""From the runs of a study to its results.json.

Nothing is measured here: the records, sums by document and facts of each run are read
from its folder, given their place in the study, and put together.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kanlm.config import Config
from kanlm.errors import UserError
from kanlm.evaluation.perplexity import Evaluation
from kanlm.experiments.derive import derive
from kanlm.experiments.provenance import collect as collect_provenance
from kanlm.experiments.result_files import read_documents, write_results
from kanlm.experiments.study import Finished, Run
from kanlm.results.read import notes_of, read_run_results, records_of
from kanlm.results.schema import ArmFacts, EvaluationKey, Note, Record


def collect(config: Config, finished: Finished) -> Path:
    """Write results.json and documents.jsonl of a study's runs into its folder.

    Raises:
        UserError: what a run has written is damaged, or the folder cannot be written.
    """
    folder = Path(config.output_dir)
    records: list[Record] = []
    documents: dict[EvaluationKey, Evaluation] = {}
    by_seed: dict[str, dict[int, list[Any]]] = {}
    outcomes: list[dict[str, Any]] = []
    notes: list[Note] = []
    strategies: dict[str, str] = {}
    for run in finished.runs:
        outcome, facts = read_run_results(run.folder / "results.json")
        outcomes.append(outcome)
        by_seed.setdefault(run.arm, {}).setdefault(run.seed, []).append(facts)
        found = records_of(outcome)
        # Pretraining has none, and is a part of the arm's results by its strategy.
        if run.stage or run.arm not in strategies:
            strategies[run.arm] = found[0].strategy
        by_document = read_documents(run.folder / "documents.jsonl")
        _check_sums(run.folder, found, by_document)
        notes += [replace(n, arm=n.arm and run.arm) for n in notes_of(outcome)]
        records += [Record(**{**asdict(record), **_key_of(run)}) for record in found]
        for key, evaluation in by_document.items():
            documents[replace(key, **_key_of(run))] = evaluation
    arms: dict[str, dict[str, Any]] = {
        name: {**combine_facts(list(seeds.values()))} for name, seeds in by_seed.items()
    }
    for name, tried in finished.sweeps.items():
        arms[name]["sweep"] = tried
    records = [replace(record, strategy=strategies[record.arm]) for record in records]
    documents = {
        replace(key, strategy=strategies[key.arm]): evaluation
        for key, evaluation in documents.items()
    }
    references, data_hash = _of_domains(outcomes)
    provenance = collect_provenance(config, data_hash)
    # Of the runs, which may have had fewer threads than this process.
    provenance |= {k: v for k, v in outcomes[0]["provenance"].items() if k == "hardware"}
    try:
        results = derive(
            records,
            arms,
            domains=list(
                dict.fromkeys([r.domain for r in finished.runs] + [r.domain for r in records])
            ),
            documents=documents,
            references=references,
            provenance=provenance,
            notes=notes,
            resamples=config.evaluation.bootstrap_resamples,
        )
    except ValueError as error:
        raise UserError(f"the runs in {folder} cannot stand side by side: {error}") from None
    write_results(folder, results, documents)
    return folder


def _check_sums(
    folder: Path, records: Sequence[Record], documents: Mapping[EvaluationKey, Evaluation]
) -> None:
    """Check that a run's two files say the same, which one with a wrong digit would not."""
    for record in records:
        evaluation = documents.get(record.key)
        if evaluation is None:
            raise UserError(f"{folder / 'documents.jsonl'}: nothing on {record.domain}")
        sums = evaluation.sums()
        alike = math.isclose(sums.pop("nats"), record.nats, rel_tol=1e-9)
        if not alike or any(getattr(record, name) != value for name, value in sums.items()):
            raise UserError(
                f"{folder}: results.json and documents.jsonl differ on {record.domain}; delete "
                "results.json and rerun the same command to make both again"
            )


def _key_of(run: Run) -> dict[str, Any]:
    return {"arm": run.arm, "seed": run.seed, "strategy": "plain", "stage": run.stage}


def combine_facts(by_seed: Sequence[Sequence[Mapping[str, Any]]]) -> ArmFacts:
    """Combine an arm's facts from those of its runs, [seed][stage].

    Tokens and seconds are what one seed took for all stages, on average over seeds, so that
    more seeds do not make an arm look dearer. Memory is the largest of all; steps, and those
    left out, are all that were taken.
    """
    facts = [fact for stages in by_seed for fact in stages]
    tokens = round(sum(fact["train_tokens"] for fact in facts) / len(by_seed))
    seconds = sum(fact["train_seconds"] for fact in facts) / len(by_seed)
    # Runs of before this was counted have none.
    compiling = sum(fact.get("compile_seconds", 0.0) for fact in facts) / len(by_seed)
    first = facts[0]
    return ArmFacts(
        feed_forward=first["feed_forward"],
        parameters=first["parameters"],
        feed_forward_parameters=first["feed_forward_parameters"],
        flops_per_token=first["flops_per_token"],
        bytes_per_decoded_token=first["bytes_per_decoded_token"],
        accounting=first["accounting"],
        train_tokens=tokens,
        train_seconds=seconds,
        compile_seconds=compiling,
        tokens_per_second=tokens / seconds,
        peak_memory_bytes=max(fact["peak_memory_bytes"] for fact in facts),
        steps=sum(fact["steps"] for fact in facts),
        skipped_steps=sum(fact["skipped_steps"] for fact in facts),
    )


def _of_domains(outcomes: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return references and fingerprints by domain; all runs have the same."""
    references: dict[str, Any] = {}
    data_hash: dict[str, str] = {}
    for outcome in outcomes:
        references |= outcome["references"]
        data_hash |= outcome["provenance"].get("data_hash", {})
    return references, data_hash
