"""One run by itself, with the same results.json and report as a study of one arm."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

from kanlm.config import Config
from kanlm.evaluation.references import cached_references
from kanlm.experiments import provenance
from kanlm.experiments.derive import derive
from kanlm.experiments.result_files import write_results
from kanlm.model import accounting as models
from kanlm.reporting.page import write_report
from kanlm.results.schema import Accounting, ArmFacts, EvaluationKey, Note, Record
from kanlm.slow_notices import announce_if_slow
from kanlm.training.callbacks import Callback
from kanlm.training.distributed import is_main_rank
from kanlm.training.resolve import resolve
from kanlm.training.run import Outcome, run
from kanlm.training.run_folder import change_of_length, claim, is_finished, lock_folder
from kanlm.training.state import TrainingState
from kanlm.training.tracking import print_line


def train(config: Config, callbacks: Sequence[Callback] = ()) -> Path | None:
    """Pretrain or fine-tune as `config` says, and write results.json last.

    A finished run is left as it is, unless it is to be longer. Returns the folder on the main
    process, else None.

    Args:
        callbacks: what else happens at the moments of the run (`kanlm.training.callbacks`).

    Raises:
        UserError: see `run`; among others, another job is at work in the folder.
    """
    # A study's arms and seeds are nothing to a run alone, and keep some settings open.
    config = resolve(replace(config, study=None))
    folder = Path(config.output_dir)
    claim(folder, config)
    changed = change_of_length(folder, config)
    if changed is not None and is_main_rank():
        print_line(changed)
    with ExitStack() as keep:
        if is_finished(folder, config):
            if not is_main_rank():
                return None
            keep.enter_context(lock_folder(folder))
        else:
            outcome = run(config, keep, callbacks=callbacks)
            if outcome is None:
                return None
            with announce_if_slow("computing references, intervals and results", print_line):
                _write_results(config, outcome)
        with announce_if_slow("writing the report", print_line):
            write_report(folder)
    return folder


def _write_results(config: Config, outcome: Outcome) -> None:
    """The run as a study of one arm, named by its label, with one stage."""
    arm = outcome.accounting.feed_forward
    step, split = outcome.progress.step, config.evaluation.split
    documents = {
        EvaluationKey(
            arm=arm,
            seed=config.seed,
            strategy=config.strategy["kind"],
            stage=0,
            domain=domain,
            step=step,
            split=split,
        ): evaluation
        for domain, evaluation in outcome.evaluations.items()
    }
    results = derive(
        [Record.of(key, evaluation.sums()) for key, evaluation in documents.items()],
        {arm: arm_facts(outcome.accounting, outcome.progress, outcome.peak_memory_bytes)},
        domains=list(outcome.evaluations),
        documents=documents,
        references={
            name: cached_references(corpus, split) for name, corpus in outcome.corpora.items()
        },
        provenance={
            **provenance.collect(
                config, {name: corpus.fingerprint for name, corpus in outcome.corpora.items()}
            ),
            "kan_backend": outcome.progress.kan_backend,
        },
        notes=[
            Note(arm=None, domain=name, note=line)
            for name, corpus in outcome.corpora.items()
            for line in corpus.notes
        ],
        resamples=config.evaluation.bootstrap_resamples,
    )
    write_results(outcome.folder, results, documents)


def arm_facts(
    accounting: models.Accounting, progress: TrainingState, peak_memory_bytes: int | None
) -> ArmFacts:
    """What results.json says of an arm beside its losses."""
    # The window holds what came since the last log line.
    tokens = progress.tokens + progress.window.tokens
    return ArmFacts(
        feed_forward=accounting.feed_forward,
        parameters=accounting.parameters["total"],
        feed_forward_parameters=accounting.parameters["feed_forward"],
        flops_per_token=accounting.flops_per_token["total"],
        bytes_per_decoded_token=accounting.bytes_per_decoded_token(),
        train_tokens=tokens,
        train_seconds=progress.seconds,
        compile_seconds=progress.compile_seconds,
        tokens_per_second=tokens / progress.seconds,
        peak_memory_bytes=peak_memory_bytes,
        steps=progress.step,
        skipped_steps=progress.guard.skipped_steps,
        best_validation={"nats_per_token": progress.best_loss, "step": progress.best_step},
        accounting=cast(Accounting, asdict(accounting)),
    )
