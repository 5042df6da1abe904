"""What the plugin reads, and that each fault does what it says."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from esperd_chaos import Chaos, Plan, plan_from, raising
from esperd_chaos.disk import FailingFilesystem
from esperd_chaos.faults import turn_a_bit
from esperd_chaos.orders import Orders
from esperd_chaos.proxy import BadLine

from esperd.errors import StoreFailed
from esperd.plugins import Plugins
from esperd.store.blobs import Blobs


def test_without_words_nothing_happens():
    assert plan_from("") == Plan()


def test_words_are_read_and_a_wrong_one_is_named_with_those_that_there_are():
    assert plan_from("kill=30, block=0.5,raise,seed=7") == Plan(kill_s=30.0, block_s=0.5, raises=True, seed=7)
    assert plan_from("orders=/tmp/a") == Plan(orders=Path("/tmp/a"))
    for wrong in ("kil=3", "kill", "raise=1", "block=-1", "seed=x"):
        with pytest.raises(ValueError, match=r"ESPERD_CHAOS|invalid literal"):
            plan_from(wrong)


def test_hooks_raise_when_they_are_told_to_and_only_then():
    job = SimpleNamespace(id="j1")
    Chaos(Plan()).esperd_job_finished(job)
    with pytest.raises(RuntimeError, match="ESPERD_CHAOS says: job j1 finished"):
        Chaos(Plan(raises=True)).esperd_job_finished(job)


def test_orders_are_whole_and_standing_still_is_asked_for_once(tmp_path):
    orders = Orders(tmp_path / "orders")
    assert (orders.clock(), orders.take_block()) == (0.0, None)
    orders.set_clock(-3600.0)
    orders.block(1.5)
    assert (orders.clock(), orders.take_block(), orders.take_block()) == (-3600.0, 1.5, None)


def test_there_is_a_plugin_for_every_hook_that_raises_in_it_and_is_listed_with_what_it_raised():
    plugins = Plugins()
    for name in raising.names():
        plugins.add(name, getattr(raising, name))
    for hook in ("job_started", "decision", "stage_changed", "job_finished"):
        plugins.notify(f"esperd_{hook}", job=None, decision=None, change=None)
    told = {plugin.name: plugin.error or "" for plugin in plugins.records()}
    assert len(told) == 2 * len(raising.HOOKS) >= 24
    assert [name for name, error in told.items() if f"chaos: {name.rpartition('_')[0]} raises" not in error] == []


def test_the_disk_fails_at_its_nth_call_and_only_then(tmp_path):
    disk = FailingFilesystem(2, errno.ENOSPC)
    disk.make_directory(tmp_path / "a", 0o700)
    with pytest.raises(OSError, match="No space left"):
        disk.make_directory(tmp_path / "b", 0o700)
    disk.make_directory(tmp_path / "c", 0o700)
    assert not (tmp_path / "b").exists()


def test_a_disk_that_fails_to_read_is_a_typed_error_at_every_call(tmp_path):
    sha256 = Blobs(tmp_path).put(b"checkpoint")
    for operation in (Blobs.contains, Blobs.verified, Blobs.get, Blobs.size, lambda blobs, _: blobs.names()):
        counted = FailingFilesystem(reads=True)
        operation(Blobs(tmp_path, counted), sha256)
        assert counted.calls
        for call in range(1, len(counted.calls) + 1):
            with pytest.raises(StoreFailed, match="EIO"):
                operation(Blobs(tmp_path, FailingFilesystem(call, reads=True)), sha256)


def test_one_bit_turns(tmp_path):
    sha256 = Blobs(tmp_path).put(bytes(100))
    turn_a_bit(Blobs(tmp_path).path(sha256), random.Random(0))
    assert sum(byte.bit_count() for byte in Blobs(tmp_path).path(sha256).read_bytes()) == 1


def test_a_bad_line_delivers_each_message_as_often_as_its_fault_says():
    line = BadLine(random.Random(0), share=1.0)
    sent, arrived = 400, []
    for number in range(sent):
        arrived += line.carry("request", [b"client", b"head", b"%d body" % number])
    count = {fault: line.injected.count(f"{fault} request") for fault in ("drop", "double", "swap", "cut")}
    assert sum(count.values()) == sent
    assert len(arrived) in (sent - count["drop"] + count["double"], sent - count["drop"] + count["double"] - 1)  # one may be held
    assert sum(not frames[1].endswith(b"head") or not frames[2].endswith(b"body") for frames in arrived) == count["cut"]
