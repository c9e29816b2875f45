"""Where a run's numbers go: metrics.jsonl always, wandb if wanted, a live progress bar.

Only the main process tracks. After an interruption the lines past the checkpoint are
cut off before the loop writes them again, so that a resumed file equals an
uninterrupted one.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console

from kanlm.atomic_io import cannot_write, write_text
from kanlm.config import Config, to_tree
from kanlm.errors import UserError
from kanlm.faults import fault_point
from kanlm.training.progress import Display, figures
from kanlm.untrusted_io import parse_object

console = Console(highlight=False)


def print_line(text: str) -> None:
    """Print a line, above the progress bar where there is one, for the terminal to wrap."""
    console.print(text, markup=False, soft_wrap=True)


class Tracker:
    """Context manager around the loop of one process.

    Args:
        folder: the run's folder.
        config: written into the wandb run.
        main: whether this is the main process; the others' calls do nothing.
        step: the checkpoint's step, 0 for a fresh run.
        lines: how many lines there were when the checkpoint was written.

    Attributes:
        lines: how many there are.
        wandb_id: identity of the wandb run that is being resumed.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        *,
        main: bool,
        step: int,
        lines: int,
        wandb_id: str | None,
    ) -> None:
        self.folder = folder
        self.config = config
        self.main = main
        self.step = step
        self.lines = lines
        self.wandb_id = wandb_id
        self.wandb_run: Any = None
        self.display = Display(console, disable=not main)

    def __enter__(self) -> Self:
        if not self.main:
            return self
        path = self.folder / "metrics.jsonl"
        keep = first_lines(path, self.lines)
        self.lines = len(keep)
        fault_point("inside-log-rewrite")
        write_text(path, "".join(keep))
        try:
            # Unbuffered, so that nothing is left to be written where writing failed.
            self.file = path.open("ab", buffering=0)
        except OSError as error:
            raise cannot_write(path, error) from None
        if self.config.tracking.wandb != "disabled":
            self._start_wandb()
        total = self.config.training.steps
        self.task = self.display.add(self.config.data.domain, total, self.step)
        self.display.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.main:
            return
        self.display.__exit__(kind, error, trace)
        self.file.close()
        if self.wandb_run is not None:
            self.wandb_run.finish(exit_code=0 if kind is None else 1)

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write one line of metrics and send its numbers to wandb.

        Args:
            kind: `train`, `validation`, `grid`, `polish`, `sample`, `unusual`, or of strategies
                `strategy` and `interpolation`.
            step: updates done.
            values: numbers and strings; a `domain` becomes part of the wandb names.

        Raises:
            UserError: the disk is full.
        """
        if not self.main:
            return
        rest = f"{json.dumps({'kind': kind, 'step': step, **values})}\n".encode()
        try:
            # Where the disk has room for a part, that is written and nothing said.
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            raise cannot_write(Path(self.file.name), error) from None
        self.lines += 1
        if self.wandb_run is not None:
            prefix = "/".join([kind, *([values["domain"]] if "domain" in values else [])])
            numbers = {
                f"{prefix}/{key}": value
                for key, value in values.items()
                if key != "domain" and value is not None
            }
            self.wandb_run.log({"step": step, **numbers})

    def show(self, done: float, left: float | None) -> None:
        """Move the progress bar: updates done, and seconds that the run will yet take."""
        if self.main:
            self.display.update(self.task, done, left)

    def show_figures(self, values: Mapping[str, Any]) -> None:
        """Show the figures of a training line next to the bar."""
        if self.main:
            self.task.figures = figures(values)

    def print_line(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.main:
            print_line(text)

    def _start_wandb(self) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self.wandb_run = wandb.init(
            project=self.config.tracking.project,
            name=self.config.output_dir,
            id=self.wandb_id,
            resume="allow",
            mode=self.config.tracking.wandb,
            dir=self.folder,
            config=to_tree(self.config),
            settings=wandb.Settings(console="off", x_disable_stats=True),
        )
        self.wandb_run.define_metric("*", step_metric="step")
        self.wandb_id = self.wandb_run.id


def first_lines(path: Path, count: int) -> list[str]:
    """The first whole lines of a metrics file, fewer if there are fewer.

    Raises:
        UserError: one of them is none that was written here.
    """
    if not count:
        return []
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    # What a crash of the machine left behind the last whole line is not a line.
    kept = [line for line in lines if line.endswith(b"\n")][:count]
    for number, line in enumerate(kept, 1):
        _check_line(line, f"{path}, line {number}")
    return [line.decode() for line in kept]


def _check_line(line: bytes, where: str) -> None:
    try:
        step = parse_object(line, finite=False).get("step")
    except ValueError:
        raise UserError(f"{where}: expected a JSON object with a step") from None
    if isinstance(step, bool) or not isinstance(step, int):
        raise UserError(f"{where}: expected a JSON object with a whole number for a step")
