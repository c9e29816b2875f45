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
from typing import Any, Literal, Self, get_args

from rich.console import Console

from kanlm.config import Config, to_tree
from kanlm.errors import UserError
from kanlm.faults import point
from kanlm.files import cannot_write, write_text
from kanlm.reading import parse_object
from kanlm.training.progress import Display, figures

#: What may be due after an update, in this order; "polished" is the validation after a polish.
Duty = Literal["validation", "polish", "polished", "sample"]
DUTIES: tuple[Duty, ...] = get_args(Duty)

console = Console(highlight=False)


def say(text: str) -> None:
    """Print a line, above the progress bar where there is one, for the terminal to wrap."""
    console.print(text, markup=False, soft_wrap=True)


class Tracker:
    """Context manager around the loop of one process.

    Arguments:
        folder: the run's folder.
        config: written into the wandb run.
        main: whether this is the main process; the others' calls do nothing.
        step: the checkpoint's step, 0 for a fresh run.
        pending: what it left to be done of that step, of `DUTIES` of the trainer.
        wandb_id: identity of the wandb run that is being resumed.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        *,
        main: bool,
        step: int,
        wandb_id: str | None,
        pending: Duty | None = None,
    ) -> None:
        self.folder = folder
        self.config = config
        self.main = main
        self.step = step
        self.pending: Duty | None = pending
        self.wandb_id = wandb_id
        self.wandb_run: Any = None
        self.display = Display(console, disable=not main)

    def __enter__(self) -> Self:
        if not self.main:
            return self
        path = self.folder / "metrics.jsonl"
        keep = lines_up_to(path, self.step, self.pending) if self.step else []
        point("inside-log-rewrite")
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

        Arguments:
            kind: `train`, `validation`, `grid`, `polish`, `sample` or `unusual`.
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
        """Put the figures of a training line beside the bar."""
        if self.main:
            self.task.figures = figures(values)

    def note(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.main:
            say(text)

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


def lines_up_to(path: Path, step: int, pending: Duty | None = None) -> list[str]:
    """The whole lines of a metrics file that were written before a checkpoint.

    Arguments:
        step: of the checkpoint.
        pending: the first of `DUTIES` that it left to be done.

    Raises:
        UserError: a whole line is none that was written here.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    kept: list[str] = []
    done: Any = None
    # What a crash of the machine left behind the last whole line is not a line.
    for number, line in enumerate((line for line in lines if line.endswith(b"\n")), 1):
        kind, line_step = _kind_and_step(line, f"{path}, line {number}")
        if line_step == step and kind in DUTIES:
            done = "polished" if kind == "validation" and done == "polish" else kind
        late = pending and done and DUTIES.index(done) >= DUTIES.index(pending)
        if line_step < step or (line_step == step and not late):
            kept.append(line.decode())
    return kept


def _kind_and_step(line: bytes, where: str) -> tuple[Any, int]:
    try:
        values = parse_object(line, finite=False)
    except ValueError:
        raise UserError(f"{where}: expected a JSON object with a step") from None
    step = values.get("step")
    if isinstance(step, bool) or not isinstance(step, int):
        raise UserError(f"{where}: expected a JSON object with a whole number for a step")
    return values.get("kind"), step
