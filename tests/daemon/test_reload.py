"""A configuration that is read again: live keys apply, the others are named, and the document says which are which."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from esperd.config import Cache, Config, Daemon, Jobs, Plugins, Retention
from esperd.daemon.reload import LIVE, compare, flat

DOCUMENT = (Path(__file__).parents[2] / "docs/service.md").read_text(encoding="utf-8")


def test_live_keys_apply_and_the_others_stay_as_they_were_and_are_named():
    in_force = Config()
    wanted = Config(
        daemon=Daemon(log_level="debug"),
        jobs=Jobs(max_running=4),
        cache=Cache(memory_bytes=1),
        plugins=Plugins(blocked=("one",)),
    )
    found = compare(in_force, wanted)
    assert found.applied == ("daemon.log_level: info -> debug", "jobs.max_running: 1 -> 4")
    assert found.needs_restart == ("cache.memory_bytes", "plugins.blocked")
    assert found.config == Config(daemon=Daemon(log_level="debug"), jobs=Jobs(max_running=4))
    again = compare(found.config, wanted)
    assert (again.applied, again.needs_restart) == ((), found.needs_restart)
    assert again.note == "reloaded: nothing changed; a restart is needed for cache.memory_bytes, plugins.blocked"


def test_the_document_lists_the_live_keys_and_no_other():
    assert flat(Config()).keys() >= LIVE
    table = DOCUMENT.partition("## Reload")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z_]+\.[a-z_]+)` \|", table, flags=re.MULTILINE)) == LIVE


def test_every_kind_of_value_survives_the_way_through_a_reload():
    wanted = msgspec.structs.replace(
        Config(), retention=Retention(events_days=1.5, events_bytes=7), plugins=Plugins(blocked=("a",))
    )
    assert compare(wanted, wanted).config == wanted
