"""Compressed files against the tools whose formats they are."""

import bz2
import gzip
import itertools
import lzma
import shutil
import subprocess

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kanlm.data.sources.packing import opened
from kanlm.errors import UserError


def zstd(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


PACKERS = {
    ".gz": ("gzip", gzip.compress),
    ".bz2": ("bzip2", bz2.compress),
    ".xz": ("xz", lzma.compress),
    ".zst": ("zstd", zstd),
}
ONE, TWO = b"first\n" * 50_000, b"second\n" * 50_000
SKIPPED = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"


def with_bad_header(packed):
    return bytes([packed[0] ^ 1]) + packed[1:]


def unpacked(folder, suffix, packed):
    """What we read, or None where it is refused."""
    path = folder / f"a.txt{suffix}"
    path.write_bytes(packed)
    said = ""
    try:
        with opened(path) as file:
            return file.read()
    except UserError as error:
        said = str(error)
    assert said.startswith(f"{path}: cannot be read: ")
    return None


def by_tool(suffix, packed):
    """What the format's own tool makes of it, None where it finds fault."""
    tool = PACKERS[suffix][0]
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} here")
    done = subprocess.run([tool, "-dc"], input=packed, capture_output=True, check=False)
    return done.stdout if done.returncode == 0 and b"garbage" not in done.stderr else None


CASES = {
    "one": lambda one, two: one,
    "two": lambda one, two: one + two,
    "three": lambda one, two: one + two + one,
    "padded within": lambda one, two: one + bytes(4) + two,
    "padded at the end": lambda one, two: one + two + bytes(8),
    "padded by three": lambda one, two: one + bytes(3) + two,
    "padded by a long way": lambda one, two: one + bytes(2**21) + two + bytes(2**20),
    "padded before": lambda one, two: bytes(4) + one,
    "a bad second header": lambda one, two: one + with_bad_header(two),
    "a second header cut off": lambda one, two: one + two[:3],
    "cut off": lambda one, two: (one + two)[:-3],
    "cut off between": lambda one, two: one[:-1],
    "something after it": lambda one, two: one + b"garbage",
    "empty": lambda one, two: b"",
    "skippable": lambda one, two: one + SKIPPED + two,
}


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("case", CASES)
def test_a_file_is_read_as_its_own_tool_reads_it(tmp_path, suffix, case):
    pack = PACKERS[suffix][1]
    packed = CASES[case](pack(ONE), pack(TWO))
    expected = by_tool(suffix, packed)
    if suffix == ".gz" and case in ("padded within", "padded by three", "padded by a long way"):
        # gzip itself warns of garbage and reads no further; nothing is lost by going on.
        expected = ONE + TWO
    assert unpacked(tmp_path, suffix, packed) == expected


@given(
    st.sampled_from([".gz", ".bz2", ".xz", ".zst"]),
    st.lists(st.binary(max_size=60), min_size=1, max_size=5),
)
@settings(max_examples=60)
def test_all_streams_are_read(tmp_path_factory, suffix, parts):
    packed = b"".join(map(PACKERS[suffix][1], parts))
    assert unpacked(tmp_path_factory.mktemp("packed"), suffix, packed) == b"".join(parts)


@pytest.mark.parametrize("suffix", PACKERS)
def test_no_changed_byte_is_read_over_in_silence(tmp_path, suffix):
    """Every byte of the second stream, one after another."""
    tool = PACKERS[suffix][0]
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} here, which writes a checksum")
    one, two = (
        subprocess.run([tool, "-c"], input=data, capture_output=True, check=True).stdout
        for data in (b"first\n" * 5, b"second\n" * 5)
    )
    whole = b"first\n" * 5 + b"second\n" * 5
    for place, bit in itertools.product(range(len(two)), (0, 5)):
        damaged = two[:place] + bytes([two[place] ^ 1 << bit]) + two[place + 1 :]
        # Not every bit of a header means something, but no text may be lost.
        assert unpacked(tmp_path, suffix, one + damaged) in (None, whole)
