"""Tables are as wide as the terminal, and no number or name in them is cut."""

import contextlib
import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from kanlm.reporting.terminal import Table, folded, print_table

NAMES = st.text("abcdefgh-_/", min_size=1, max_size=60)
NUMBERS = st.floats(0, 9999).map(lambda value: f"{value:.3f}")


def printed(table: Table, columns: int) -> list[str]:
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setenv("COLUMNS", str(columns))
        print_table(table)
    return out.getvalue().splitlines()


@given(st.data(), st.integers(1, 2), st.integers(40, 120))
def test_no_line_is_too_wide_and_nothing_is_cut(
    data: st.DataObject, names: int, width: int
) -> None:
    numbers = data.draw(st.integers(1, 10))
    count = data.draw(st.integers(1, 4))
    rows = [
        [
            *data.draw(st.lists(NAMES, min_size=names, max_size=names)),
            *data.draw(st.lists(NUMBERS, min_size=numbers, max_size=numbers)),
        ]
        for _ in range(count)
    ]
    heads = data.draw(st.lists(NAMES, min_size=numbers, max_size=numbers))
    columns = [*["arm", "domain"][:names], *heads]
    lines = printed(Table("wide", columns, rows, names=names), width)
    assert max(map(cell_len, lines)) <= width
    assert "…" not in "".join(lines)
    words = " ".join(lines).split()
    for row in rows:
        for number in row[names:]:
            assert number in words
    # Each block has all the names, a line after another.
    squeezed = re.sub(r"\s", "", "".join(lines))
    if names == 1 and count == 1:
        assert all(char in squeezed for char in rows[0][0])


def test_what_does_not_fit_stands_below_with_its_names() -> None:
    row = ["a rather long name of an arm", *(f"{number:.3f}" for number in range(1000, 1010))]
    table = Table("wide", ["arm", *(f"column {n}" for n in range(10))], [row])
    narrow = printed(table, 40)
    assert sum("a rather long" in line for line in narrow) == 5
    assert [word for line in narrow for word in line.split() if ".000" in word] == row[1:]
    (whole,) = [line for line in printed(table, 200) if "a rather long" in line]
    assert re.split("  +", whole.strip()) == row


@given(st.text("ab/-_ 界", max_size=50), st.integers(2, 20))
def test_folding_keeps_every_character_but_spaces_at_line_ends(text: str, width: int) -> None:
    lines = folded(text, width).splitlines()
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(cell_len(line) <= width for line in lines)


def test_a_name_is_folded_at_its_joints() -> None:
    assert folded("runs/my-first-study/kan", 12) == "runs/my-\nfirst-study/\nkan"
    assert folded("abcdefghij", 4) == "abcd\nefgh\nij"


def test_a_mark_of_what_was_chosen_leaves_a_column_of_numbers() -> None:
    table = Table("", ["rate", "kan", "note"], [["0.1", "▸ 2.1", "[1]"], ["0.2", "diverged", ""]])
    assert [table.is_text(column) for column in range(3)] == [True, False, True]
