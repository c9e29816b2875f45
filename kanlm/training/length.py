"""A run that is to have another length than it began with.

It may, where all updates so far are those of a run that had that length from the start: then what
comes of it is the same to the bit. Imports no torch.
"""

from pathlib import Path

from kanlm.config import Config
from kanlm.training.schedule import learning_rate_ratio


def why_not(steps_before: int, config: Config, step: int, *, finished: bool) -> str | None:
    """Why a run cannot be continued to the length in `config`, in words; None if it can.

    Args:
        steps_before: its length so far.
        config: differs from the run's in `training.steps` alone.
        step: updates in its newest checkpoint, 0 without one.
        finished: whether it has results.
    """
    training, schedule = config.training, config.schedule
    if finished and not step:
        return "its checkpoints are gone"
    if step >= training.steps:
        return f"it is at step {step:,} already"
    for update in range(step):
        before, after = (
            learning_rate_ratio(schedule, update, steps) for steps in (steps_before, training.steps)
        )
        if before != after:
            return (
                f"by schedule.kind = {schedule.kind} the rate of update {update + 1:,}, which it "
                "has taken, depends on the number of steps; by constant it does not, and by "
                "warmup-stable-decay not before the decay"
            )
    if step < steps_before:
        return None
    if training.polish_steps:
        return f"it is at its end, and training.polish_steps = {training.polish_steps} changed it"
    keeps_best = training.keep_best_checkpoint or training.early_stopping_patience is not None
    if keeps_best and training.evaluate_every and step % training.evaluate_every:
        return (
            f"it was validated at its end, step {step:,}, which a longer run is not, and that "
            "might have decided on the best model"
        )
    return None


def study_around(run: Path) -> Path | None:
    """The study that a run belongs to, by where it lies."""
    place = run.resolve()
    if place.parent.name == "trials" or place.parent.name.startswith("seed-"):
        study = place.parents[2]
        if (study / "config.yaml").exists():
            return study
    return None
