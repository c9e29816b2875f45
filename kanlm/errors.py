"""The one exception that a user is meant to read.

`kanlm` on the command line turns a `UserError` into a single line on standard
error and exit code 2. Anything else is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right: a setting, a file, a folder, the network."""

    #: Whether another process of the same run prints it. None is what all processes find, of
    #: which the first of each machine prints it: that only one has the file is possible.
    reported_by_other_rank: bool | None = None


class Interrupted(Exception):
    """A signal or a time limit asked for a stop, and what was running has saved itself.

    Args:
        exit_code: 128 and the signal's number, or `EXIT_TIME_LIMIT`.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__("stopped and saved; rerun the same command to resume")
        self.exit_code = exit_code
        self.reported_by_other_rank = False


#: Exit code where `training.time_limit_minutes` are over: sysexits.h's "try again later".
EXIT_TIME_LIMIT = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the closest of `known`, else the list of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; expected one of: {', '.join(known)}" if known else ""


def first_line(error: Exception) -> str:
    """Return the first line of a library's error; of YAML's, the problem and its line."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"{getattr(error, 'problem', None)} in line {mark.line + 1}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
