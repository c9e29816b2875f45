"""Datasets through `datasets.load_dataset`, on builders that need no network."""

import json
import socket
from itertools import chain

import pyarrow
import pytest
from pyarrow import parquet

from kanlm.config import TokenizerSettings
from kanlm.data.sources.hub import Hub
from kanlm.data.tokenizer import build_tokenizer
from kanlm.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))


@pytest.fixture
def folder(tmp_path):
    """A dataset folder of two JSONL files."""
    (tmp_path / "tales").mkdir()
    for part in range(2):
        rows = [{"body": f"tale {part * 50 + row}", "id": row} for row in range(50)]
        path = tmp_path / "tales" / f"train-{part}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


TALES = [f"tale {number}" for number in range(100)]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"name": "tales"}, {"name": "json", "data_files": "tales/*.jsonl"}],
    ids=["folder", "builder"],
)
def test_rows_come_in_order_and_reading_goes_on_from_any_cursor(folder, options, streaming):
    source = Hub(folder, **options, column="body", streaming=streaming)
    pairs = list(source.read())
    assert [text for text, _ in pairs] == TALES
    for place in (0, 48, 49, 50, 77, 99):
        cursor = json.loads(json.dumps(pairs[place][1]))
        assert [text for text, _ in source.read(cursor)] == TALES[place + 1 :]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("count", [1, 3, 101])
def test_parts_join_to_all_rows(folder, streaming, count):
    source = Hub(folder, name="tales", column="body", streaming=streaming)
    parts = [list(source.part(index, count)) for index in range(count)]
    assert list(chain.from_iterable(parts)) == TALES
    # A stream is divided between its two files.
    assert sum(map(bool, parts)) == min(count, 2 if streaming else 100)


def test_the_fingerprint_follows_options_and_local_files(folder):
    first = Hub(folder, name="tales", column="body").fingerprint()
    assert Hub(folder, name="tales").fingerprint() != first
    (folder / "tales" / "train-1.jsonl").write_text('{"body": "other"}')
    assert Hub(folder, name="tales", column="body").fingerprint() != first


def test_the_fingerprint_follows_files_that_a_pattern_finds(folder):
    def fingerprint():
        return Hub(folder, name="json", data_files="tales/*.jsonl", column="body").fingerprint()

    first = fingerprint()
    (folder / "tales" / "train-1.jsonl").write_text('{"body": "other"}')
    changed = fingerprint()
    assert changed != first
    (folder / "tales" / "train-2.jsonl").write_text('{"body": "more"}')
    assert fingerprint() not in (first, changed)


def test_rows_of_parquet_files_go_on_from_any_cursor(folder):
    """Files of several row groups, which the stream reads by the group."""
    tables = [pyarrow.table({"body": TALES[start : start + 50]}) for start in (0, 50)]
    (folder / "sealed").mkdir()
    for part, table in enumerate(tables):
        parquet.write_table(table, folder / "sealed" / f"train-{part}.parquet", row_group_size=7)
    source = Hub(folder, name="sealed", column="body")
    pairs = list(source.read())
    assert [text for text, _ in pairs] == TALES
    for place in (0, 6, 7, 20, 48, 49, 50, 57, 98, 99):
        cursor = json.loads(json.dumps(pairs[place][1]))
        assert cursor == pairs[place][1]
        assert [text for text, _ in source.read(cursor)] == TALES[place + 1 :]


@pytest.mark.parametrize("streaming", [True, False])
def test_what_is_wrong_with_a_dataset_is_said_in_one_line(folder, streaming):
    def read(**options):
        return list(Hub(folder, name="tales", streaming=streaming, **options).read())

    with pytest.raises(UserError, match="hub dataset 'tales': no column 'bodi'; did you mean"):
        read(column="bodi")
    with pytest.raises(UserError, match="hub dataset 'tales': column 'id' holds int"):
        read(column="id")
    with pytest.raises(UserError, match=r"hub dataset 'tales': .*split") as raised:
        read(column="body", split="dev")
    assert "\n" not in str(raised.value)


@pytest.fixture(params=["no network", "HF_HUB_OFFLINE"])
def unreachable(request, monkeypatch):
    """No hub, and nobody who would wait for it."""

    def fail(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    def wait(seconds):
        pytest.fail(f"waits {seconds} s to try again")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr("time.sleep", wait)
    if request.param == "HF_HUB_OFFLINE":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("streaming", [True, False])
def test_without_network_the_offline_alternatives_are_named_at_once(
    tmp_path, unreachable, streaming, capsys
):
    with pytest.raises(UserError, match=r"'no/where': no network .*stdlib-prose.*kind: files"):
        list(Hub(tmp_path, name="no/where", streaming=streaming).read())
    assert capsys.readouterr() == ("", "")


def test_without_network_a_pretrained_tokenizer_is_refused_at_once(unreachable, capsys):
    settings = TokenizerSettings(kind="pretrained", name="no/where")
    with pytest.raises(UserError, match=r"'no/where': cannot be loaded \(no network: "):
        build_tokenizer(settings, lambda: iter(()))
    assert capsys.readouterr() == ("", "")


def test_a_name_the_hub_does_not_know_is_no_network_trouble(tmp_path, monkeypatch):
    from datasets.exceptions import DatasetNotFoundError

    def unknown(*_, **__):
        raise DatasetNotFoundError("Dataset 'no/where' doesn't exist on the Hub")

    monkeypatch.setattr("kanlm.data.sources.hub.hub_problem", lambda: None)
    monkeypatch.setattr("datasets.load_dataset", unknown)
    with pytest.raises(UserError, match="'no/where': Dataset 'no/where' doesn't exist"):
        list(Hub(tmp_path, name="no/where").read())
