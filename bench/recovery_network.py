"""A cut network between two hosts: a daemon on one, its client and its workers on the other."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import recovery_daemon
from leftovers import left_behind, own_temporary_folder, shared
from recovery_daemon import ANSWER_S, CONFIG, outcome, undisturbed, wait_until_it_goes_on

from esperd.testing import running_daemon

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugins" / "esperd-chaos" / "src"))
from esperd_chaos.network import NoNamespaces, open_to_far, two_hosts

CUTS_S = (6.0, 0.5, 12.0, 2.0)
"""How long the line is cut, in turns; workers and daemon give each other up after four seconds."""
CUTS_A_JOB = 2
CLIENT_S = 120.0
"""How long the far client waits for one answer, and goes on asking: longer than any cut."""
FAR_CLIENT = """
import json, sys
from esperd.errors import AskTimeout
from esperd.sync_client import SyncClient


def heard(ask):
    while True:
        try:
            return ask()
        except AskTimeout:  # it may have been heard and its answer lost: the key tells
            continue


wanted = json.loads(sys.argv[1])
with SyncClient(sys.argv[2], 5.0, float(sys.argv[5]), server_key=sys.argv[3], client_key=sys.argv[4]) as esper:
    for number in range(int(sys.argv[6])):
        handle = heard(lambda: esper.submit(wanted, idempotency_key=f"far {number}"))
        print(json.dumps({"id": handle.id}), flush=True)
        seen = [event.sequence for event in handle.watch()]
        info = handle.wait()
        print(json.dumps({"id": handle.id, "state": info.state, "whole": seen == list(range(1, len(seen) + 1))}), flush=True)
"""


def cut_lines(scratch: Path, count: int, epochs: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Cut the line again and again while a far client submits and watches jobs that far workers train."""
    try:
        yield from _cut_lines(scratch, count, epochs, rng)
    except NoNamespaces as error:
        print(error, file=sys.stderr)


def _cut_lines(scratch: Path, count: int, epochs: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    state = scratch / "state"
    config, access = open_to_far(state, scratch / "keys", CONFIG)
    environment = {**own_temporary_folder(scratch), "PYTHONPATH": recovery_daemon.paths(scratch)}
    before = shared()
    jobs = -(-count // CUTS_A_JOB)
    with (
        two_hosts() as hosts,
        running_daemon(state, config, python=hosts.near_python(scratch), environment=environment) as daemon,
        hosts.tunnel(scratch, daemon.runtime_directory / "workers.sock", PYTHONPATH=environment["PYTHONPATH"]) as hub,
    ):
        here = recovery_daemon.job(scratch, epochs)
        reference, limit_s = undisturbed(daemon, here)
        wanted = {**here, "python": str(hosts.far_python(scratch, hub))}
        arguments = (json.dumps(wanted), access.listen, access.server_key, str(access.client_key), str(CLIENT_S), str(jobs))
        with hosts.on(hosts.far, "-c", FAR_CLIENT, *arguments) as client:
            for number in range(jobs):
                assert client.stdout is not None
                submitted = json.loads(client.stdout.readline() or "{}").get("id")
                if submitted is None:
                    yield {"part": "cut", "fault": "cut", "recovered": False, "problem": "the far client gave up"}
                    break
                for cut in range(CUTS_A_JOB * number, min(CUTS_A_JOB * (number + 1), count)):
                    time.sleep(rng.uniform(0.0, 5.0))
                    with daemon.sync_client(ANSWER_S) as esper:
                        last = esper.job(submitted).events()[-1].sequence
                    cut_s = CUTS_S[cut % len(CUTS_S)]
                    hosts.cut()
                    time.sleep(cut_s)
                    hosts.heal()
                    began = time.monotonic()
                    problem = wait_until_it_goes_on(daemon, submitted, last, began, limit_s)
                    seconds = round(time.monotonic() - began, 2)
                    told = {"job": number, "recovered": not problem, "seconds": seconds, "problem": problem}
                    yield {"part": "cut", "fault": f"line cut for {cut_s:g} s", **told}
                ended = outcome(daemon, submitted, wanted, f"far {number}", reference, limit_s)
                seen = json.loads(client.stdout.readline() or "{}")
                if seen != {"id": submitted, "state": "succeeded", "whole": True}:
                    ended |= {"wrong": 1, "problem": f"the far client saw {seen} {ended['problem']}"}
                yield {"part": "job", "of": "cut", "job": number, **ended}
        runtime, pids = daemon.runtime_directory, {daemon.pid}
    yield {"part": "end", "of": "cut", "leaked": left_behind(runtime, scratch, pids, before)}
