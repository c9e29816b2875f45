"""A table, and how it is printed: as wide as the terminal, with no number and no word broken.

What does not fit side by side stands below, in blocks of columns that each begin with the
columns that name the rows; long names continue in the next line.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable

#: Marks what was chosen.
CHOSEN = "▸"
#: Share of the terminal that the naming columns may take where not all columns fit.
_NAMES = 0.4
#: Fewest characters of a name in a line.
_LEAST = 8


@dataclass(frozen=True)
class Table:
    """Text in rows and columns; the first columns name, the others are numbers."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    #: What a reader must know to read the numbers rightly.
    note: str = ""
    #: Indices of rows that a rule stands above.
    rules: list[int] = field(default_factory=list)
    #: Lines below; those that a row refers to begin with its mark.
    footnotes: list[str] = field(default_factory=list)
    #: How many columns name a row.
    names: int = 1

    def is_text(self, column: int) -> bool:
        """Whether a column holds names; numbers are aligned to the right."""
        return column == 0 or not any(
            row[column].lstrip(f"+−{CHOSEN} ")[:1].isdigit() for row in self.rows
        )


def print_table(table: Table) -> None:
    """Print a table under its title and above its note."""
    console = Console(highlight=False, markup=False)
    console.print()
    console.print(table.title, style="bold")
    for block in blocks(table, console.width):
        needed = _width(block)
        # Rich never prints wider than a console is, whatever it is asked for.
        Console(highlight=False, markup=False, width=max(needed, console.width)).print(block)
    for line in (table.note, *table.footnotes):
        if line:
            console.print(line, style="dim")


def blocks(table: Table, width: int) -> list[RichTable]:
    """Lay out the body of a table in as many blocks of columns as `width` characters ask for.

    Only a single column of numbers that is wider than the terminal makes a block too wide.
    """
    everything = _rich(table, range(len(table.columns)), None)
    if _width(everything) <= width:
        return [everything]
    share = max(_LEAST, int(_NAMES * width) // table.names)
    names, others = range(table.names), range(table.names, len(table.columns))
    shown: list[list[int]] = [[]]
    for column in others:
        if shown[-1] and _width(_rich(table, [*names, *shown[-1], column], share)) > width:
            shown.append([])
        shown[-1].append(column)
    return [_rich(table, [*names, *block], share) for block in shown]


def _rich(table: Table, columns: Sequence[int], share: int | None) -> RichTable:
    """Lay out some columns; names are folded to `share` characters a line."""
    rich = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in columns:
        justify = "left" if table.is_text(column) else "right"
        head = table.columns[column].replace(" ", "\n")
        head = head if share is None else folded(head, max(share, _LEAST))
        rich.add_column(head, justify=justify, vertical="bottom", no_wrap=True)
    for number, row in enumerate(table.rows, start=1):
        cells = [
            folded(row[column], share) if share and column < table.names else row[column]
            for column in columns
        ]
        rich.add_row(*cells, end_section=number in table.rules)
    return rich


def _width(rich: RichTable) -> int:
    console = Console(width=10_000)
    return Measurement.get(console, console.options, rich).maximum


def folded(text: str, width: int) -> str:
    """Fold text into lines of at most `width` characters, at the joints of names if possible."""
    lines = [""]
    for piece in re.split(r"(?<=[\s/_,.=+−–-])|(?=\n)", text):
        if piece.startswith("\n"):
            lines.append("")
            piece = piece[1:]
        if lines[-1] and cell_len(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        while cell_len(piece.rstrip()) > width:
            cut = max(1, width - (cell_len(piece[:width]) - len(piece[:width])))
            lines[-1], piece = piece[:cut], piece[cut:]
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)
