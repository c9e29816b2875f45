"""What the arms of a study may differ in, and what would make their figures incomparable."""

from collections.abc import Mapping, Sequence
from typing import Any

from kanlm.config.merging import leaves, lies_in, nested

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
        ValueError: it does not, or as of `check_own`.
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
