"""GPUs: each is measured for itself, a job gets one, by its UUID, and waits where none has enough memory left."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import anyio
import msgspec
import pytest
from daemon_jobs import QUICK, job
from test_jobs_actor import Office, office

from esperd.config import Jobs, Resources
from esperd.daemon import placing
from esperd.daemon.cards import Card, ask_driver, looked_again, read_cards, visible
from esperd.daemon.machine import Machine
from esperd.daemon.placement import Need, allowance, never_fits, placed
from esperd.daemon.usage import Usage
from esperd.daemon.worker_processes import worker_environment, worker_name
from esperd.errors import NeverFits
from esperd.messages.jobs import CancelJob, GetJob, Job, SubmitJob
from esperd.testing import until

GIB = 1024**3
A, B = "GPU-3f1c77a2-94f6-41c5-b1a8-0b5d1e6c2d11", "GPU-a8d2be90-6a55-4ac0-8b54-2f2f3b0a7e42"
MIG = "MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f"


def card(uuid, index, total, free, **more):
    return Card(uuid=uuid, index=index, name="card", memory_bytes=total * GIB, free_bytes=free * GIB, **more)


def wants(gib, **more):
    return Need(memory_bytes=None, cores=1, gpu_memory_bytes=None if gib is None else gib * GIB, on_gpu=True, **more)


def room(*cards):
    return Machine(memory_bytes=None, cores=64.0, cards=cards)


@pytest.mark.parametrize(
    ("told", "read"),
    [
        ("", []),
        (f"0, {A}, NVIDIA H100 80GB HBM3, 81559, 81008, Disabled\n", [(0, A, 81559, 81008)]),
        (
            f"0, {A}, NVIDIA A100-SXM4-40GB, 40960, 40337, Enabled\n1, {B}, NVIDIA A100-SXM4-40GB, 40960, 20111, Disabled\n",
            [(0, A, None, None), (1, B, 40960, 20111)],
        ),
        (f"0, {A}, NVIDIA GeForce GTX 1080, 8119, 7800, [N/A]\n", [(0, A, 8119, 7800)]),
        (f"0, {A}, NVIDIA GB10, [N/A], [N/A], [N/A]\n", [(0, A, None, None)]),
    ],
)
def test_what_the_driver_tells_is_read_card_by_card_and_what_it_does_not_tell_is_unknown(told, read):
    assert [(found.index, found.uuid, found.memory_bytes, found.free_bytes) for found in read_cards(told)] == [
        (index, uuid, *(size and size * 2**20 for size in sizes)) for index, uuid, *sizes in read
    ]


@pytest.mark.parametrize(
    ("variable", "left"),
    [
        (None, [A, B]),
        ("1,0", [B, A]),
        ("1", [B]),
        (f"{B}", [B]),
        ("GPU-a8d2", [B]),
        ("", []),
        ("-1", []),
        ("0,7,1", [A]),  # the first that is none ends the list
        ("0,0,1", [A]),
        (MIG, [MIG]),
    ],
)
def test_the_variable_leaves_the_cards_that_cuda_would_see(variable, left):
    assert [found.uuid for found in visible((card(A, 0, 80, 80), card(B, 1, 40, 40)), variable)] == left


@pytest.mark.parametrize(
    ("wanted", "running", "cards", "lacks", "given"),
    [
        (wants(10), [], (card(A, 0, 80, 80), card(B, 1, 40, 40)), "", A),  # the most memory left
        (wants(10), [wants(10, card=A)], (card(A, 0, 80, 70), card(B, 1, 40, 40)), "", B),  # the fewest jobs
        (wants(50), [wants(10, card=A)], (card(A, 0, 80, 70), card(B, 1, 40, 40)), "", A),  # the only one it fits on
        (wants(50), [wants(50, card=A)], (card(A, 0, 80, 80), card(B, 1, 40, 40)), "GPU memory: it takes 50.00 GiB", None),
        (wants(30), [], (card(A, 0, 80, 20), card(B, 1, 40, 40)), "", B),  # others hold the first
        (wants(30), [], (card(A, 0, 80, 20),), "left: GPU 0 (card) 20.00 GiB of 80.00 GiB", None),
        (wants(35), [wants(30, card=A)], (card(A, 0, 80, 40, others_bytes=40 * GIB),), "GPU memory", None),  # not yet taken
        (wants(None), [wants(70, card=A)], (card(A, 0, 80, 10), card(B, 1, 40, 1)), "", B),  # unknown: held against nobody
        (wants(90), [], (card(A, 0, 80, 80), card(B, 1, 40, 40)), "", A),  # measured once; alone it may try
        (wants(90), [wants(1, card=B)], (card(A, 0, 80, 80), card(B, 1, 40, 40)), "GPU memory", None),
        (wants(9), [], (Card(uuid=MIG),), "", MIG),
        (wants(9), [], (), "", None),
        (Need(memory_bytes=None, cores=1, gpu_memory_bytes=None), [], (card(A, 0, 80, 80),), "", None),
    ],
)
def test_a_job_gets_the_card_it_fits_on_or_waits_and_says_for_what(wanted, running, cards, lacks, given):
    found = placed(wanted, running, room(*cards))
    assert (found.card.uuid if found.card else None) == given
    assert lacks in found.lacks
    assert bool(found.lacks) == bool(lacks)


def test_a_job_larger_than_every_card_never_fits_and_cards_are_not_added_up():
    two = room(card(A, 0, 40, 40), card(B, 1, 24, 24))
    assert never_fits(wants(40), two) == ""
    assert never_fits(wants(41), two) == "GPU memory: it takes 41.00 GiB, the largest card has 40.00 GiB"
    assert never_fits(wants(41), room(card(A, 0, 40, 40), Card(uuid=MIG))) == ""


def test_the_configuration_limits_each_card_and_stands_for_one_that_no_driver_tells_of():
    limited = allowance(room(card(A, 0, 40, 40), card(B, 1, 24, 24)), Resources(gpu_memory_bytes=30 * GIB))
    assert [found.memory_bytes for found in limited.cards] == [30 * GIB, 24 * GIB]
    alone = allowance(room(), Resources(gpu_memory_bytes=30 * GIB))
    assert never_fits(wants(31), alone)
    assert placed(wants(20), [wants(20, card="")], alone).lacks
    assert "CUDA_VISIBLE_DEVICES" not in worker_environment(QUICK, threads=1, card="")


def test_what_others_hold_is_measured_where_no_job_of_ours_is():
    before = looked_again((), (card(A, 0, 80, 60), card(B, 1, 40, 40)), ())
    assert [found.others_bytes for found in before] == [20 * GIB, 0]
    after = looked_again(before, (card(A, 0, 80, 10), card(B, 1, 40, 30)), {A})
    assert [(found.others_bytes, found.free_bytes) for found in after] == [(20 * GIB, 10 * GIB), (10 * GIB, 30 * GIB)]


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A program that says what ``nvidia-smi`` would; returns how to have it say something else."""
    told = tmp_path / "told"
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncase "$*" in *--query-gpu=index,uuid,name,*) cat {told};; *) exit 2;; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return told.write_text


def test_a_driver_that_says_nonsense_or_fails_tells_of_no_card(driver, tmp_path):
    driver("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n")
    assert ask_driver() == ()
    (tmp_path / "told").unlink()
    assert ask_driver() == ()


class Recording(Office):
    """Keeps what its workers would have been started with."""

    def __init__(self, system, store):
        super().__init__(system, store)
        self.specs = {}

    async def start_worker(self, spec):
        self.specs[spec.name] = spec
        await super().start_worker(spec)


@pytest.mark.asyncio
async def test_two_jobs_get_a_card_each_and_the_third_waits_until_memory_is_left(driver, tmp_path, monkeypatch):
    monkeypatch.setattr(placing, "FRESH_S", 1.0)
    driver(f"0, {A}, NVIDIA L4, 20480, 20480, Disabled\n1, {B}, NVIDIA L4, 20480, 20480, Disabled\n")
    async with office(tmp_path) as plain:
        here = Recording(plain.system, plain.store)
        here.config = msgspec.structs.replace(QUICK, jobs=Jobs(max_running=3), resources=Resources(cores=64.0))
        await here.open()

        async def submit(gib):
            wanted = msgspec.convert(job(1, device="cuda", resources={"gpu_memory_bytes": gib * GIB}), Job)
            return (await here.ask(SubmitJob(job=wanted, idempotency_key=f"{gib}"))).id

        with pytest.raises(NeverFits, match=r"it takes 21.00 GiB, the largest card has 20.00 GiB"):
            await submit(21)
        first, second = await submit(12), await submit(13)
        given = {}
        for job_id in (first, second):
            await here.leased(job_id, 1)
            given[job_id] = here.specs[worker_name(job_id, 1)].environment["CUDA_VISIBLE_DEVICES"]
        assert set(given.values()) == {A, B}
        assert given[first] in (await here.ask(GetJob(id=first))).card
        assert {found.uuid: found.jobs for found in here.actor.cards()} == {uuid: (job_id,) for job_id, uuid in given.items()}

        third = await submit(14)

        async def says(what):
            return what in (await here.ask(GetJob(id=third))).waits_for

        await until(lambda: says("GPU memory: it takes 14.00 GiB; left: GPU 0 (NVIDIA L4)"))
        driver(f"0, {A}, NVIDIA L4, 20480, 2048, Disabled\n1, {B}, NVIDIA L4, 20480, 2048, Disabled\n")  # others came
        await here.ask(CancelJob(id=first))
        await plain.system.stop(worker_name(first, 1), grace_s=0.0)
        await until(lambda: says("2.00 GiB of 20.00 GiB"))
        driver("the driver fell silent")  # what is not known is held against nobody
        await here.leased(third, 1)
        assert here.specs[worker_name(third, 1)].environment["CUDA_VISIBLE_DEVICES"] == given[first]


@pytest.mark.asyncio
async def test_a_driver_that_never_answers_is_asked_once_and_jobs_go_on_without_it():
    now, asked, answer = [100.0], [], threading.Event()

    def ask():
        asked.append(now[0])
        answer.wait(20.0)
        return (card(A, 0, 80, 20),)

    place = placing.Placing(room(card(A, 0, 80, 80)), lambda: now[0], ask)
    wanted = msgspec.convert(job(1, device="cuda", resources={"gpu_memory_bytes": GIB}), Job)

    def lacks():
        return place.lacking("one", wanted, Usage(), [], Resources())

    async def has_asked():
        return bool(asked)

    assert lacks() == placing.LOOKING
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(place.look, list)
        await until(has_asked)
        assert lacks() == placing.LOOKING
        assert not place.look_is_due, "one look at a time"
        await place.look(list)
        assert len(asked) == 1
        now[0] += placing.STUCK_S + 1
        assert lacks() == "", "by what was known"
        place.freed(wants(60, card=A))
        answer.set()
    assert place.look_is_due is False
    assert lacks() == placing.LOOKING, "a job that ended during a look makes it old"


def test_a_job_that_takes_all_of_a_card_is_tried_on_an_empty_one_though_the_driver_keeps_some():
    driver_keeps = Card(uuid=A, index=0, memory_bytes=80 * GIB, free_bytes=80 * GIB - GIB // 2, others_bytes=GIB // 2)
    assert placed(wants(80), [], room(driver_keeps)) == ("", driver_keeps)
    assert placed(wants(80), [wants(1, card=A)], room(driver_keeps)).card is None


@pytest.mark.gpu
def test_on_a_gpu_the_driver_tells_of_it_and_a_worker_sees_the_one_it_was_given():
    (first, *_) = ask_driver()
    assert first.memory_bytes is not None
    assert first.free_bytes is not None
    environment = {**os.environ, **worker_environment(QUICK, threads=1, card=first.uuid)}
    code = "import torch; print(torch.cuda.device_count(), torch.cuda.get_device_name(0))"
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    assert told.split(maxsplit=1) == ["1", f"{first.name}\n"]
