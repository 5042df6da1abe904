from __future__ import annotations

import json
import sys
import time

import pytest

from esperd.cli.client import esper
from esperd.cli.event_files import opened
from esperd.cli.events import found, moment
from esperd.cli.exit_codes import run
from esperd.errors import MissingExtra
from esperd.messages.telemetry import CheckpointSaved, Event, EventsFound, ExportFailed, FindEvents, Place


def event(number: int) -> Event:
    body = ExportFailed(directory="/full", reason="no space")
    return Event(job="j1", sequence=number, at=1_700_000_000.0 + number, body=body)


class Log:
    """Answers searches with these pages, one after the other, and remembers how it was asked."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    async def ask(self, message, _answer):
        self.asked.append(message)
        return self.answers.pop(0)


@pytest.mark.asyncio
async def test_a_search_goes_on_page_by_page_and_then_with_what_was_recorded_since():
    place = Place(at=2.0, number=2)
    log = Log(
        EventsFound(events=(event(1), event(2)), next=place, recorded=3),
        EventsFound(events=(event(3),), next=None, recorded=3),
        EventsFound(events=(event(4),), next=None, recorded=4),
    )
    asked = FindEvents(job="j1", limit=2)
    assert [event.sequence async for event in found(log, asked, 4, followed=True)] == [1, 2, 3, 4]
    assert [(each.after, each.recorded_until, each.recorded_after, each.limit) for each in log.asked] == [
        (None, None, None, 2),
        (place, 3, None, 2),
        (None, None, 3, 1),
    ]


def test_a_time_is_iso_8601_or_an_age():
    assert moment(None, None, "2026-01-31T12:00+00:00") == 1_769_860_800.0
    ages = {"90s": 90, "10m": 600, "2h": 7_200, "1.5d": 129_600}
    assert {text: round(time.time() - moment(None, None, text)) for text in ages} == ages


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--since", "yesterday"], "'yesterday' is no time"),
        (["--export", "events.csv"], "--export writes .jsonl or .parquet, not events.csv"),
        (["--export", "events.jsonl", "--follow"], "leave --follow out"),
    ],
)
def test_what_cannot_be_asked_is_told_before_a_daemon_is_needed(words, told, capsys):
    assert run(esper, ["events", *words]) == 2
    assert told in capsys.readouterr().err


EVENTS = [event(1), Event(job="j2", sequence=1, at=1.25, body=CheckpointSaved(epoch=1, sha256="a", size_bytes=1, seconds=0.5))]


def test_a_json_lines_file_holds_what_json_prints(tmp_path):
    with opened(tmp_path / "events.jsonl") as write:
        for each in EVENTS:
            write(each)
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(line["job"], line["at"], line["body"]["type"]) for line in lines] == [
        ("j1", 1_700_000_001.0, "ExportFailed"),
        ("j2", 1.25, "CheckpointSaved"),
    ]


def test_a_parquet_file_has_times_types_and_bodies(tmp_path, monkeypatch):
    from pyarrow import parquet

    monkeypatch.setattr("esperd.cli.event_files.ROW_GROUP", 1)
    with opened(tmp_path / "events.parquet") as write:
        for each in EVENTS:
            write(each)
    table = parquet.read_table(tmp_path / "events.parquet")
    assert table.column_names == ["job", "sequence", "at", "type", "body"]
    rows = table.to_pylist()
    assert [(row["job"], row["at"].timestamp(), row["type"]) for row in rows] == [
        ("j1", 1_700_000_001.0, "ExportFailed"),
        ("j2", 1.25, "CheckpointSaved"),
    ]
    assert json.loads(rows[1]["body"])["seconds"] == 0.5
    assert parquet.ParquetFile(tmp_path / "events.parquet").num_row_groups == 2


def test_without_pyarrow_parquet_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    told = r'pip install "esperd\[parquet\]", or export to a \.jsonl file'
    with pytest.raises(MissingExtra, match=told), opened(tmp_path / "events.parquet"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_finished_is_not_there(tmp_path):
    (tmp_path / "events.jsonl").write_text("before")

    def interrupted():
        with opened(tmp_path / "events.jsonl") as write:
            write(EVENTS[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]
