"""The standard-library sources against Python's own view of the same modules."""

import ast
import importlib
import inspect
import io
import subprocess
import sys
import textwrap
import tokenize

import pytest

from kanlm.data.sources import make_source
from kanlm.data.sources.stdlib import (
    StdlibCode,
    StdlibProse,
    docstring_documents,
    remove_docstrings,
    topic_sections,
)
from kanlm.data.sources.stdlib_modules import MODULES
from kanlm.errors import UserError

AWKWARD = '''\
"""Module."""  # kept
# é before columns that count bytes


class A:
    "only a docstring"


class B:
    """Text

    of é lines
    """

    x = 1  # kept


def one_line(): "é doc"
def two(): "doc"; return 2
def three():
    r"""raw""" ; return 3
async def four():
    ("in "
     "brackets")
    return "x"
def five():
    f"{1} is no docstring"
    "nor is this"
if True:
    def six():
        """doc"""
        try:
            def seven():
                """doc"""
        finally:
            class C:
                """doc"""
                y = """no docstring"""
match 1:
    case 1:
        def eight():
            """doc"""
            # only a comment
'''


def stripped_by_ast(text):
    """Take docstrings out of the tree instead of the text."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            rest = node.body[1:]
            node.body = rest if rest or isinstance(node, ast.Module) else [ast.Pass()]
    return ast.dump(tree)


def comments(text):
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


def test_removing_docstrings_leaves_the_tree_and_the_comments_of_awkward_code():
    stripped = remove_docstrings(AWKWARD, ast.parse(AWKWARD))
    assert ast.dump(ast.parse(stripped)) == stripped_by_ast(AWKWARD)
    assert comments(stripped) == comments(AWKWARD)
    assert '"nor is this"' in stripped
    assert '"""no docstring"""' in stripped


@pytest.mark.parametrize("name", ["argparse", "typing", "unittest.mock", "_pydecimal", "asyncio"])
def test_stripped_modules_are_otherwise_untouched(name):
    text = inspect.getsource(importlib.import_module(name))
    stripped = remove_docstrings(text, ast.parse(text))
    assert ast.dump(ast.parse(stripped)) == stripped_by_ast(text)
    assert comments(stripped) == comments(text)
    # But for what stands in for a docstring, every line is the original's, in order.
    lines = [line for line in stripped.split("\n") if line.strip() != "pass"]
    original = iter(text.split("\n"))
    assert all(line in original for line in lines)


def test_docstrings_stand_under_the_names_that_pydoc_gives_them():
    import argparse

    documents = list(docstring_documents("argparse", ast.parse(inspect.getsource(argparse))))
    text = "\n".join(documents)
    for name in ("argparse", "argparse.ArgumentParser", "argparse.HelpFormatter.add_usage"):
        owner = importlib.import_module("argparse")
        for part in name.split(".")[1:]:
            owner = getattr(owner, part)
        docstring = owner.__dict__.get("__doc__") if inspect.isclass(owner) else owner.__doc__
        if docstring:
            assert f"{name}\n\n{inspect.cleandoc(docstring)}\n" in text
    assert len(documents) > 1
    assert documents[0].startswith("argparse\n\n")


def test_long_classes_are_documents_of_their_own_and_short_ones_are_not():
    source = textwrap.dedent(f'''
        """Top."""
        class Long:
            """{"word " * 250}"""
        class Short:
            """Short."""
            def method(self):
                """Does."""
                def inner():
                    """Hidden."""
    ''')
    short, long = docstring_documents("m", ast.parse(source))
    assert short == "m\n\nTop.\n\nm.Short\n\nShort.\n\nm.Short.method\n\nDoes.\n"
    assert long.startswith("m.Long\n\nword")


def test_sections_that_topics_share_come_once():
    part = "Part\n====\n\nText of the part.\n"
    whole = f"Whole\n*****\n\nIntroduction.\n\n{part}"
    chapter = part.replace("=", "*")
    sections = list(topic_sections([whole, chapter, "no title at all"]))
    assert sections == ["Whole\n*****\n\nIntroduction.\n", part, "no title at all\n"]


def test_no_module_is_imported():
    code = (
        "import sys; from kanlm.data.sources.stdlib import StdlibProse;"
        "source = StdlibProse(); before = set(sys.modules);"
        "list(source.documents());"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"pydoc_data", "pydoc_data.topics"}


def test_both_sources_hold_enough_documents_for_a_hash_split_and_share_no_docstring():
    prose = list(make_source({"kind": "stdlib-prose"}).documents())
    code = list(make_source({"kind": "stdlib-code"}).documents())
    for documents in (prose, code):
        sizes = [len(text) for text in documents]
        assert len(documents) >= 300
        assert max(sizes) < 0.04 * sum(sizes)
    joined = "\n".join(code)
    assert "Object for parsing command line strings into Python objects." in "\n".join(prose)
    assert "Object for parsing command line strings into Python objects." not in joined
    assert "def parse_args(self, args=None, namespace=None):" in joined


def test_reading_goes_on_from_a_cursor():
    source = StdlibProse()
    pairs = list(source.read())
    assert list(source.read(pairs[41][1])) == pairs[42:]


def test_a_missing_module_is_left_out_and_said(monkeypatch):
    whole = StdlibCode().fingerprint()
    monkeypatch.setattr("kanlm.data.sources.stdlib.MODULES", ["json", "no_such_module"])
    source = StdlibCode()
    assert list(source.files) == ["json"]
    assert source.notes() == ["1 modules are not in this Python: no_such_module"]
    assert source.fingerprint() != whole


def test_no_module_at_all_is_an_error(monkeypatch):
    monkeypatch.setattr("kanlm.data.sources.stdlib.MODULES", ["no_such_module"])
    with pytest.raises(UserError, match="no Python source files in"):
        StdlibCode()


def test_the_list_is_sorted_and_without_repetition():
    assert sorted(set(MODULES)) == MODULES
