"""Settings of a study, and what would make the figures of its arms incomparable."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kanlm.config.merging import leaves, lies_in, nested
from kanlm.config.schema.types import PositiveInt, Seed
from kanlm.errors import nearest

#: Of an arm: more would take years, and their list alone all memory.
MOST_TRIALS = 10_000
#: What decides which tokens an arm sees, and what it is scored on.
SHARED = (
    "data",
    "tokenizer",
    "evaluation",
    "model.context_length",
    "training.steps",
    "training.batch_size",
    # When early stopping looks, and so where it stops.
    "training.evaluate_every",
    "training.early_stopping_patience",
    "shrink",
)
#: What a study sets for every run itself, so that it would go unread in a part.
OWN = ("seed", "output_dir", "initialize_from", "study")


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Arms × seeds × stages, for `kanlm compare` and `kanlm continual`."""

    #: Partial configurations by the name of the arm, each laid over this one. The first arm is the
    #: reference. Settings that decide on which tokens an arm is trained and scored must be the same
    #: for all.
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: Seeds of every arm, of initial weights and data order.
    seeds: list[Seed] = field(default_factory=lambda: [0])
    #: What twins have in common with the first arm, or with an arm whose width cannot be solved:
    #: parameters or FLOPs of the feed-forward blocks. Arms that state `hidden` are left alone.
    match: Literal["parameters", "flops"] = "parameters"
    #: Values to try by dotted setting. Every arm tries all combinations with the first seed; the
    #: one with the lowest validation loss is used for the other seeds. A trial may diverge.
    grid: dict[str, list[Any]] = field(default_factory=dict)
    #: Grids of single arms by name, which replace `grid` and have equally many trials.
    arm_grids: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    #: Number of arms trained with the other seeds: those with the lowest validation loss with the
    #: first seed, and always the first arm; null is all.
    finalists: PositiveInt | None = None
    #: Partial configurations of the stages after pretraining, each with a `data.domain` of its own.
    stages: list[dict[str, Any]] = field(default_factory=list)
    #: Command that starts a run, such as `accelerate launch --num_processes 8`; null runs each in
    #: one process. It is taken from the command line only.
    launcher: str | None = None
    #: Number of runs at the same time, each with its share of the CPU threads. Their times are then
    #: those of a shared machine.
    parallel_runs: PositiveInt = 1

    def __post_init__(self) -> None:
        if not self.arms:
            raise ValueError("arms is empty: name at least one")
        for name in self.arms:
            if not name or set(name) & set("/\\:") or name.startswith("."):
                raise ValueError(f"arm {name!r}: expected a name fit for a folder")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds = {self.seeds}: expected at least one, none twice")
        for name in self.arm_grids:
            if name not in self.arms:
                raise ValueError(f"arm_grids names '{name}'{nearest(name, self.arms)}")
        self._check_parts()

    def _check_parts(self) -> None:
        """Check that arms, trials and stages set only what is theirs to set."""
        for name, part in self.arms.items():
            check_arm(part, f"arms.{name}")
        for grid in (self.grid, *self.arm_grids.values()):
            trials = math.prod(len(values) for values in grid.values())
            if trials > MOST_TRIALS:
                raise ValueError(f"grid has {trials:,} trials: expected at most {MOST_TRIALS:,}")
        check_grid(self.grid, "grid")
        for name, grid in self.arm_grids.items():
            check_grid(grid, f"arm_grids.{name}")
        for i, part in enumerate(self.stages):
            check_stage(part, f"stages.{i}")


def check_arm(part: Mapping[str, Any], where: str) -> None:
    """Check that an arm's part leaves alone what all arms share.

    Raises:
        ValueError: naming the first setting that it does not; `where` is the part's name.
    """
    check_own(part, where)
    for name, value in leaves(part):
        if lies_in(name, SHARED):
            raise ValueError(
                f"{where} sets {name} = {value}: every arm trains on identical batches and is "
                "scored on the same text, so arms may differ in model, optimizer, schedule, "
                f"penalties and training, but not in {', '.join(SHARED)}"
            )


def check_stage(part: Mapping[str, Any], where: str) -> None:
    """Check that a stage names its text; it would get that of pretraining by another name.

    Raises:
        ValueError: it does not, or see `check_own`.
    """
    check_own(part, where)
    data = part.get("data")
    if not isinstance(data, Mapping) or not data.get("sources"):
        raise ValueError(f"{where}.data.sources is missing: name the text of the stage's domain")


def check_own(part: Mapping[str, Any], where: str) -> None:
    """Check that a part sets nothing that the study sets.

    Raises:
        ValueError: naming the first setting that it does.
    """
    for name, value in leaves(part):
        if lies_in(name, OWN):
            hint = "give study.seeds instead" if name == "seed" else "leave it out"
            raise ValueError(
                f"{where} sets {name} = {value}, which a study sets for each of its runs: {hint}"
            )


def check_grid(grid: Mapping[str, Sequence[Any]], where: str) -> None:
    """Check that a grid has values to try, in settings that arms may differ in.

    Raises:
        ValueError: naming the first setting that has none, one twice, or may not differ.
    """
    for name, values in grid.items():
        if not values or any(values.count(value) > 1 for value in values):
            raise ValueError(f"{where}[{name}] = {values}: expected at least one value, none twice")
        for value in values:
            check_arm(nested(name, value), where)
