"""What the plugin reads, and that each fault does what it says."""

from __future__ import annotations

import errno
import random
from types import SimpleNamespace

import pytest
from esperd_chaos import Chaos, Plan, plan_from
from esperd_chaos.disk import FailingFilesystem
from esperd_chaos.faults import turn_a_bit
from esperd_chaos.proxy import BadLine

from esperd.store.blobs import Blobs


def test_without_words_nothing_happens():
    assert plan_from("") == Plan()


def test_words_are_read_and_a_wrong_one_is_named_with_those_that_there_are():
    assert plan_from("kill=30, block=0.5,raise,seed=7") == Plan(kill_s=30.0, block_s=0.5, raises=True, seed=7)
    for wrong in ("kil=3", "kill", "raise=1", "block=-1", "seed=x"):
        with pytest.raises(ValueError, match=r"ESPERD_CHAOS|invalid literal"):
            plan_from(wrong)


def test_hooks_raise_when_they_are_told_to_and_only_then():
    job = SimpleNamespace(id="j1")
    Chaos(Plan()).esperd_job_finished(job)
    with pytest.raises(RuntimeError, match="ESPERD_CHAOS says: job j1 finished"):
        Chaos(Plan(raises=True)).esperd_job_finished(job)


def test_the_disk_fails_at_its_nth_call_and_only_then(tmp_path):
    disk = FailingFilesystem(2, errno.ENOSPC)
    disk.make_directory(tmp_path / "a", 0o700)
    with pytest.raises(OSError, match="No space left"):
        disk.make_directory(tmp_path / "b", 0o700)
    disk.make_directory(tmp_path / "c", 0o700)
    assert not (tmp_path / "b").exists()


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
