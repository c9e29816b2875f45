"""What is tracked can be read back: metrics.jsonl, and wandb's own file."""

import errno
import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

from kanlm import slow_notices
from kanlm.config import Config, from_tree, merge, to_tree
from kanlm.errors import UserError
from kanlm.experiments.single import train
from kanlm.training import run as runs
from kanlm.training.resolve import resolve
from kanlm.training.tracking import Tracker, first_lines
from kanlm.training.trainer import Trainer

BLOCK = 32768
FILE_HEADER, RECORD_HEADER = 7, 7


def wandb_records(path: Path) -> Iterator[Record]:
    """The records of a `.wandb` file: protocol buffers in LevelDB's log format.

    Blocks of 32 KiB hold chunks of (crc, length, kind); kind 1 is a whole record, 2 to 4
    are its first, middle and last part. A header of 7 bytes opens the file.
    """
    data, place, parts = path.read_bytes(), FILE_HEADER, b""
    while place + RECORD_HEADER <= len(data):
        if BLOCK - place % BLOCK < RECORD_HEADER:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + RECORD_HEADER])
        if kind == 0:
            return
        place += RECORD_HEADER
        parts += data[place : place + length]
        place += length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def offline_runs(folder: Path) -> list[list[Record]]:
    """The records of each start of a run, in the order of the starts."""
    files = sorted(
        folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime
    )
    return [list(wandb_records(path)) for path in files]


def history(records: list[Record]) -> list[dict]:
    lines = []
    for record in records:
        if record.HasField("history"):
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            lines.append({key: value for key, value in items.items() if not key.startswith("_")})
    return lines


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def as_wandb_sees(line: dict) -> dict:
    kind, domain = line["kind"], line.get("domain")
    prefix = f"{kind}/{domain}" if domain else kind
    # It has no word for a number that is not known.
    known = {k: v for k, v in line.items() if v is not None}
    values = {k: v for k, v in known.items() if k not in ("kind", "step", "domain")}
    return {"step": line["step"], **{f"{prefix}/{key}": value for key, value in values.items()}}


def test_an_offline_run_holds_the_config_every_metric_and_the_resumed_id(
    config: Config, at, capfd: pytest.CaptureFixture[str]
):
    config = resolve(from_tree(merge(to_tree(config), {"tracking": {"wandb": "offline"}})))

    def crash(trainer: Trainer) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        runs.run(config, callbacks=[at(10, crash)])
    runs.run(config)

    folder = Path(config.output_dir)
    first, second = offline_runs(folder)
    started = [next(r.run for r in records if r.HasField("run")) for records in (first, second)]
    assert started[0].run_id == started[1].run_id
    found = {item.key: json.loads(item.value_json) for item in started[0].config.update}
    assert {key: found[key] for key in to_tree(config)} == to_tree(config)

    # The crash was in step 11 and the last checkpoint at step 8: what lies between was
    # logged twice, with the same losses.
    expected = [as_wandb_sees(line) for line in metrics(folder)]
    assert history(second) == [line for line in expected if line["step"] > 8]
    untimed = [{k: v for k, v in line.items() if "second" not in k} for line in history(first)]
    assert untimed == [
        {k: v for k, v in line.items() if "second" not in k}
        for line in expected
        if line["step"] <= 10
    ]
    assert "wandb" not in capfd.readouterr().err


def test_disabled_leaves_no_wandb_folder(config: Config):
    runs.run(config)
    assert not (Path(config.output_dir) / "wandb").exists()


def test_resuming_cuts_later_and_unfinished_lines(config: Config, tmp_path: Path):
    lines = [json.dumps({"kind": "train", "step": step}) + "\n" for step in (3, 6, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"kind": "tra')
    quiet = replace(config, tracking=replace(config.tracking, wandb="disabled"))
    with Tracker(tmp_path, quiet, main=True, step=6, lines=2, wandb_id=None) as tracker:
        tracker.log("train", 7, {"loss": 1.0})
    assert [line["step"] for line in metrics(tmp_path)] == [3, 6, 7]


class SmallDisk:
    """Takes so many bytes at a time and so many in all, as a disk that is getting full."""

    name = "metrics.jsonl"

    def __init__(self, room: int) -> None:
        self.room, self.written = room, b""

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = data[: min(self.room, 7)]
        self.room -= len(taken)
        self.written += taken
        return len(taken)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("missing", [0, 1, 20])
def test_a_line_is_whole_or_its_end_is_missed(missing: int, config: Config, tmp_path: Path):
    """A disk with room for a part of it takes that, and only the next write fails."""
    line = json.dumps({"kind": "train", "step": 1, "loss": 1.25}).encode() + b"\n"
    disk = SmallDisk(len(line) - missing)
    quiet = replace(config, tracking=replace(config.tracking, wandb="disabled"))
    with Tracker(tmp_path, quiet, main=True, step=0, lines=0, wandb_id=None) as tracker:
        tracker.file.close()
        tracker.file = disk  # pyright: ignore[reportAttributeAccessIssue]
        if missing:
            with pytest.raises(UserError, match="no space is left on the disk"):
                tracker.log("train", 1, {"loss": 1.25})
        else:
            tracker.log("train", 1, {"loss": 1.25})
    assert disk.written == line[: len(line) - missing]


def test_a_log_that_cannot_be_opened_is_named(config: Config, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("kanlm.training.tracking.write_text", lambda path, text: path.mkdir())
    with (
        pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: Is a directory"),
        Tracker(tmp_path, config, main=True, step=0, lines=0, wandb_id=None),
    ):
        pass


@pytest.mark.parametrize(
    "line",
    [
        b"[]",
        b"{}",
        b'{"step": 1.5}',
        b'{"step": true}',
        b'{"step": 1, "text": "\xff"}',
        # Half of a pair, which Python's reader of JSON takes from bytes.
        b'{"step": 1, "text": "\xed\xa0\x80"}',
        b'{"a":' * 10_000,
    ],
    ids=lambda line: line[:30],
)
def test_a_line_that_was_not_written_here_ends_a_resumption(line: bytes, tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: expected a JSON object with a"):
        first_lines(path, 3)


def test_a_run_says_what_takes_long(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(slow_notices, "PATIENCE", 0.0)
    train(config)
    said = capsys.readouterr().out
    for what in (
        "building the model",
        "looking for a checkpoint",
        "making the first update",
        "evaluating on words (test)",
        "writing the model",
        "computing references",
        "writing the report",
    ):
        assert what in said
