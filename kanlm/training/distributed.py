"""What the processes of a run do together.

What the main process does alone may take hours, as the preparation of a text does, and a
collective gives up after minutes (ten under NCCL). So the others wait for it in a process group
of their own, by gloo, which has no such limit and sees at once when a process has died.
"""

import os
import pickle
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator

from kanlm.errors import UserError, first_line

T = TypeVar("T")

#: Longer than anything takes.
_TIMEOUT = timedelta(days=365)
#: Seconds between looks at what is waited for, at most: signals are handled in between.
_PATIENCE = 0.05


def is_main_rank() -> bool:
    """Whether this is the main process of a run, by what its launcher says, before they join."""
    return os.environ.get("RANK", "0") == "0"


def sum_over_ranks(accelerator: Accelerator, tensor: torch.Tensor) -> torch.Tensor:
    """All-reduce; the tensor itself where there is one process."""
    total = accelerator.reduce(tensor, "sum")
    assert isinstance(total, torch.Tensor)
    return total


def run_on_main(accelerator: Accelerator, act: Callable[[], T]) -> T:
    """Call `act` on the main rank alone, and return its result on all ranks.

    Ranks that continued after the main rank has failed would wait for it forever.

    Raises:
        UserError: as `act` does, on all ranks; the main rank reports it. Or the main rank has
            died.
    """
    outcome: Any = None, None
    failure: UserError | None = None
    if accelerator.is_main_process:
        try:
            outcome = act(), None
        except UserError as error:
            failure = error
            outcome = None, str(error)
    result, message = _of_main(accelerator, outcome)
    if failure is not None:
        raise failure
    if message is not None:
        raise reported_by_other_rank(UserError(message))
    return result


def gather_results(accelerator: Accelerator, act: Callable[[], T]) -> list[T]:
    """Call `act` on every rank, and return all results, by rank, on all of them.

    Raises:
        UserError: as `act` does on one of them, on all ranks; the first that failed reports it.
    """
    result: T | None = None
    failure: UserError | None = None
    try:
        result = act()
    except UserError as error:
        failure = error
    outcomes: list[Any] = _of_all(accelerator, (result, None if failure is None else str(failure)))
    failed = [rank for rank, (_, error) in enumerate(outcomes) if error is not None]
    if not failed:
        return [result for result, _ in outcomes]
    if failure is not None and failed[0] == accelerator.process_index:
        failure.reported_by_other_rank = False
        raise failure
    raise reported_by_other_rank(UserError(outcomes[failed[0]][1]))


def reported_by_other_rank(error: UserError) -> UserError:
    """Mark the error as one that another rank reports to the user."""
    error.reported_by_other_rank = True
    return error


def tear_down(accelerator: Accelerator) -> None:
    """Destroy the process groups; nothing of this module can be called afterwards."""
    _groups.clear()
    accelerator.end_training()


#: The group in which processes wait for each other, by the one of all processes that it is of.
_groups: dict[Any, Any] = {}


def _group() -> Any:
    """The group without a limit of time; all processes must ask for the first at once."""
    if dist.group.WORLD not in _groups:
        _groups.clear()
        _groups[dist.group.WORLD] = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    return _groups[dist.group.WORLD]


def _of_main(accelerator: Accelerator, value: T) -> T:
    """The main process's value, in all."""
    if accelerator.num_processes == 1:
        return value
    written = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    size = torch.tensor(written.numel())
    try:
        _wait(dist.broadcast(size, 0, group=_group(), async_op=True))
        if not accelerator.is_main_process:
            written = torch.empty(int(size), dtype=torch.uint8)
        _wait(dist.broadcast(written, 0, group=_group(), async_op=True))
    except RuntimeError as error:
        raise _died(accelerator, error) from None
    return pickle.loads(written.numpy().tobytes())


def _of_all(accelerator: Accelerator, value: T) -> list[T]:
    """Every process's value, by rank, in all."""
    if accelerator.num_processes == 1:
        return [value]
    values: list[Any] = [None] * accelerator.num_processes
    try:
        dist.all_gather_object(values, value, group=_group())
    except RuntimeError as error:
        raise _died(accelerator, error) from None
    return values


def _wait(work: Any) -> None:
    """Wait as `work.wait()` does, but let signals end it."""
    pause = 1e-4
    while not work.is_completed():
        time.sleep(pause)
        pause = min(2 * pause, _PATIENCE)
    work.wait()


def _died(accelerator: Accelerator, error: RuntimeError) -> UserError:
    """What is told where a process is gone that is waited for: by one that may have seen it."""
    died = UserError(
        "another process of this run has ended, which says above why, or was killed "
        f"({first_line(error)})"
    )
    died.reported_by_other_rank = accelerator.process_index > 1
    return died
