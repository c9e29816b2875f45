"""What the processes of a run do together."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from kanlm.errors import UserError

T = TypeVar("T")


def sum_over_processes(accelerator: Accelerator, tensor: torch.Tensor) -> torch.Tensor:
    """All-reduce; the tensor itself where there is one process."""
    total = accelerator.reduce(tensor, "sum")
    assert isinstance(total, torch.Tensor)
    return total


def on_main(accelerator: Accelerator, act: Callable[[], T]) -> T:
    """Call `act` in the main process alone, and let all processes share in what came of it.

    A process that went on while the main one had failed would wait for it for ever.

    Raises:
        UserError: as `act` does, in every process; the main one tells it.
    """
    outcome: list[Any] = [None, None]
    failure: UserError | None = None
    if accelerator.is_main_process:
        try:
            outcome[0] = act()
        except UserError as error:
            failure = error
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise told_elsewhere(UserError(outcome[1]))
    return outcome[0]


def in_all(accelerator: Accelerator, act: Callable[[], T]) -> list[T]:
    """Call `act` in every process, and give all of them what came of it, by rank.

    Raises:
        UserError: as `act` does in one of them, in every process; the first of those tells it.
    """
    result: T | None = None
    failure: UserError | None = None
    try:
        result = act()
    except UserError as error:
        failure = error
    outcomes: list[Any] = gather_object([(result, None if failure is None else str(failure))])
    failed = [rank for rank, (_, error) in enumerate(outcomes) if error is not None]
    if not failed:
        return [result for result, _ in outcomes]
    if failure is not None and failed[0] == accelerator.process_index:
        raise failure
    raise told_elsewhere(UserError(outcomes[failed[0]][1]))


def told_elsewhere(error: UserError) -> UserError:
    """The same error, of which another process tells the user."""
    error.told_elsewhere = True
    return error
