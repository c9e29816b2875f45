"""A sweep: what became of an arm's trials, and which of them is chosen.

A trial's loss is the validation loss of the model that it ended with, because that model is
trained further. A trial that gave up, or ended without a finite loss, has diverged: it counts as
tried and is never chosen.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kanlm.config import Config
from kanlm.errors import UserError
from kanlm.results.log import read_lines
from kanlm.results.read import read_run_results
from kanlm.results.schema import Trial
from kanlm.results.sweep import edges
from kanlm.training.run_folder import is_finished


def has_diverged(config: Config) -> bool:
    """Whether a run gave up: its last steps, as many as are allowed, were left out."""
    path = Path(config.output_dir) / "metrics.jsonl"
    if is_finished(path.parent) or not path.exists():
        return False
    lines, limit = list(read_lines(path)), config.training.max_skipped_steps
    if not lines or not _is_skipped(lines[-1]):
        return False
    skipped = [line["step"] for line in lines if _is_skipped(line)]
    return skipped[-limit:] == list(range(skipped[-1] - limit + 1, skipped[-1] + 1))


def _is_skipped(line: dict[str, Any]) -> bool:
    return line["kind"] == "unusual" and line.get("skipped") is True


def final_loss(config: Config) -> tuple[float, int]:
    """Return validation bits per byte of a finished run's model, NaN if not finite, and its step.

    Without early stopping that is the last validation of the domain trained on, with it the
    best, whose model is gone back to.

    Raises:
        UserError: the run's files cannot be read, or contradict each other.
    """
    folder = Path(config.output_dir)
    _, facts = read_run_results(folder / "results.json")
    validations = [
        line
        for line in read_lines(folder / "metrics.jsonl")
        if line["kind"] == "validation" and line["domain"] == config.data.domain
    ]
    best = facts["best_validation"]
    of_best = [line for line in validations if line["step"] == best["step"]]
    logged = [line.get("nats_per_token") for line in of_best]
    unlogged = best["nats_per_token"] is not None and best["nats_per_token"] not in logged
    if not validations or unlogged:
        raise UserError(
            f"{folder}: results.json and metrics.jsonl differ on the best validation loss; delete "
            "results.json and rerun the same command to make both again"
        )
    stopped_early = config.training.early_stopping_patience is not None and of_best
    line = of_best[-1] if stopped_early else validations[-1]
    return line["bits_per_byte"], line["step"]


def outcome(settings: dict[str, Any], config: Config) -> Trial:
    """Find out what became of a trial that is over.

    Raises:
        UserError: see `final_loss`.
    """
    if has_diverged(config):
        *_, last = read_lines(Path(config.output_dir) / "metrics.jsonl")
        return Trial(settings, "diverged", None, last["step"], chosen=False)
    loss, step = final_loss(config)
    if not math.isfinite(loss):
        return Trial(settings, "diverged", None, step, chosen=False)
    return Trial(settings, "finished", loss, step, chosen=False)


def choose(trials: Sequence[Trial], arm: str) -> list[Trial]:
    """Mark the trial of least loss as chosen, the first of several.

    Raises:
        UserError: all diverged.
    """
    losses = [math.inf if t.bits_per_byte is None else t.bits_per_byte for t in trials]
    best = min(range(len(losses)), key=losses.__getitem__)
    if losses[best] == math.inf:
        raise UserError(
            f"study.arms.{arm}: all {len(trials)} trials of its grid diverged, so that none "
            "can be chosen: try lower values of optimizer.learning_rate"
        )
    return [replace(trial, chosen=i == best) for i, trial in enumerate(trials)]


def record(trials: Sequence[Trial], *, seed: int, domain: str, others: int) -> dict[str, Any]:
    """Return a sweep as results.json holds it.

    Args:
        seed: of all trials.
        domain: whose validation split was measured.
        others: trials in the folder that the grid does not name.
    """
    rows = [asdict(trial) for trial in trials]
    return {
        "seed": seed,
        "domain": domain,
        "split": "validation",
        "trials": rows,
        "edges": edges(rows),
        "other_trials": others,
    }


def sentence(trials: Sequence[Trial]) -> str:
    """Say which trial was chosen of how many."""
    (best,) = [trial for trial in trials if trial.chosen]
    settings = ", ".join(f"{name} = {value}" for name, value in best.settings.items())
    diverged = sum(trial.state == "diverged" for trial in trials)
    of_them = f" ({diverged} diverged)" if diverged else ""
    return (
        f"{settings} is best of {len(trials)} trials{of_them}, with {best.bits_per_byte:.4f} bits "
        "per byte on validation"
    )
