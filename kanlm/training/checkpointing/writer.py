"""Writing checkpoints, in the background where that is wanted.

1. The main process makes a folder under another name, in which all processes write.
2. Each writes its own part. This may happen on a thread, from a copy of what is to be
   written, while training continues.
3. When all have written, the main process adds the index and moves the folder into place,
   then `latest`, and deletes what is not kept.

Steps 1 and 3 are taken by all processes together, after the same training step: they agree
on it in the sum that every step has anyway.
"""

import itertools
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from kanlm.atomic_io import (
    atomic_folder,
    cannot_write,
    flush,
    remove_folder,
    remove_leftovers,
    write_errors_as_user_errors,
    write_text,
)
from kanlm.checksums import FileFacts, file_facts, write_checksums
from kanlm.faults import fault_point
from kanlm.training.checkpointing.reader import checkpoint_folder, random_file, random_state
from kanlm.training.checkpointing.tensors import Index, Kind, OwnPart, write_index
from kanlm.training.distributed import gather_results, run_on_main
from kanlm.training.run_folder import checkpoint_steps

#: What a rank has written: where rows of sharded tensors are, and size and checksum by file name.
Written = tuple[Index, dict[str, FileFacts]]
#: By kind and name.
Tensors = Mapping[Kind, Mapping[str, torch.Tensor]]


class Writer:
    """Checkpoints of one run, one at a time.

    All processes call `start` and `finish` at once, and see the same folder.

    Args:
        accelerator: the processes.
        folder: of the checkpoints.
        background: write on a thread, from a copy on the host.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, *, background: bool) -> None:
        self.accelerator, self.folder, self.background = accelerator, folder, background
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._stack = ExitStack()
        self._writing: Future[Written] | None = None
        self._complete: Callable[[list[Written]], None]

    def start(
        self,
        step: int,
        tensors: Tensors,
        state: dict[str, Any],
        *,
        keep: int,
        best_step: int | None = None,
    ) -> None:
        """Begin `step-N`, having finished what was begun before.

        Args:
            tensors: by kind and name, whole or sharded; each rank with its part (`reshard`).
            state: as of the main rank.
            keep: how many of the newest are kept.
            best_step: of a checkpoint that is kept as well.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        target = checkpoint_folder(self.folder, step)
        fault_point("before-checkpoint-write")

        def complete() -> None:
            fault_point("after-write-before-latest")
            write_text(self.folder / "latest", target.name)
            _prune(self.folder, step, keep, best_step)

        self._start(target, tensors, {"step": step, **state}, random_state(), complete)

    def write(self, target: Path, tensors: Tensors, state: dict[str, Any]) -> None:
        """Write a folder of the same form, and wait until it is in its place.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        self._start(target, tensors, state, None, lambda: None)
        self.finish()

    def _start(
        self,
        target: Path,
        tensors: Tensors,
        state: dict[str, Any],
        numbers: dict[str, torch.Tensor] | None,
        then: Callable[[], None],
    ) -> None:
        """Begin a folder, and call `then` on the main rank when it is in its place."""
        self.finish()
        rank = self.accelerator.process_index
        # The main rank holds the draft; it moves into place when the stack closes.
        draft = run_on_main(
            self.accelerator, lambda: self._stack.enter_context(atomic_folder(target))
        )
        own = OwnPart.of(tensors, rank)

        def write(part: OwnPart) -> Written:
            with write_errors_as_user_errors(target):
                files = part.write(draft)
                if numbers is not None:
                    files.append(random_file(draft, rank))
                    save_file(numbers, files[-1])
                for file in files:
                    flush(file)
                return part.index, {file.name: file_facts(file) for file in files}

        def complete(written: list[Written]) -> None:
            with write_errors_as_user_errors(target):
                write_index(draft, [index for index, _ in written])
                (draft / "state.json").write_text(json.dumps(state, indent=1))
                fault_point("inside-checkpoint-write")
                write_checksums(
                    draft, {name: known for _, each in written for name, known in each.items()}
                )
                fault_point("before-checkpoint-move")
            self._stack.close()
            then()

        self._complete = complete
        if not self.background:
            self._finish(lambda: write(own))
            return
        try:
            self._writing = self._threads.submit(write, own.copied())
        except BaseException:
            # Memory may not hold a copy.
            self._forget()
            raise

    @property
    def written(self) -> bool:
        """Whether this process has nothing left to write."""
        return self._writing is None or self._writing.done()

    def finish(self) -> None:
        """Wait until the checkpoint that was begun is in its place.

        Raises:
            UserError: it cannot be written; nothing of it is left.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            self._finish(writing.result)

    def _finish(self, write: Callable[[], Written]) -> None:
        """Have all processes write, or wait for what they write, and move it into place."""
        try:
            written = gather_results(self.accelerator, write)
            run_on_main(self.accelerator, lambda: self._complete(written))
        except BaseException:
            self._forget()
            raise

    def abandon(self) -> None:
        """Leave nothing of a checkpoint that was begun: the run has failed meanwhile."""
        if self._writing is not None:
            self._writing.exception()
            self._forget()

    def _forget(self) -> None:
        """Delete the draft."""
        self._writing = None
        with suppress(_ForgottenError), self._stack:
            raise _ForgottenError


class _ForgottenError(Exception):
    """Tells the draft's keeper not to move it into place."""


def _prune(folder: Path, step: int, keep: int, best_step: int | None) -> None:
    """Delete checkpoints older than the `keep` newest up to `step`, the best excepted."""
    old = itertools.islice((s for s in checkpoint_steps(folder) if s <= step), keep, None)
    try:
        for doomed in old:
            if doomed != best_step:
                remove_folder(checkpoint_folder(folder, doomed))
        remove_leftovers(folder)
    except OSError as error:
        raise cannot_write(folder, error) from None
