"""Faults of the chaos plugin on real daemons: several on one, and a line that is cut between two hosts."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import pytest

from esperd.config import Config, Jobs, Workers
from esperd.messages.jobs import JobState
from esperd.messages.telemetry import EpochCompleted
from esperd.testing import running_daemon

sys.path.append(str(Path(__file__).parents[2] / "plugins" / "esperd-chaos" / "src"))
sys.path.append(str(Path(__file__).parents[2] / "bench"))

import recovery_daemon
from esperd_chaos import faults, raising
from esperd_chaos.network import NoNamespaces, open_to_far, two_hosts
from esperd_chaos.orders import Orders

CONFIG = Config(
    jobs=Jobs(max_attempts=50, backoff_s=0.05, backoff_max_s=0.2),
    workers=Workers(heartbeat_interval_s=0.3, heartbeat_timeout_s=20.0),
)


@pytest.mark.timeout(600)
def test_stale_workers_a_blocked_loop_a_clock_set_back_slow_watchers_and_raising_hooks_change_no_story(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "SLOWLY_READ", 10)
    orders = Orders(tmp_path / "orders")
    environment = recovery_daemon.chaos_environment(tmp_path, f"orders={orders.folder}")
    raising.install(tmp_path / "packages")
    with running_daemon(tmp_path / "state", CONFIG, environment=environment) as daemon, daemon.sync_client() as esper:
        handle = esper.submit(recovery_daemon.job(tmp_path, 14))
        for event in handle.watch():
            if isinstance(event.body, EpochCompleted):
                break
        victim = faults.Victim(daemon=daemon, job=handle.id, rng=random.Random(0), orders=orders)
        faults.say_what_a_stale_worker_says(victim)
        orders.block(1.0)
        faults.set_clock_back(victim)  # its worker is lost, too, and may not be waited for until the clock has come round again
        faults.read_slowly(victim)
        info = handle.wait()
        assert (info.state, info.epoch) == (JobState.SUCCEEDED, 14)
        assert info.attempt == 2
        assert recovery_daemon.story(handle) == ""
        told = [event.at for event in handle.events()]
        assert min(told) < told[0] - 30.0  # the clock did jump, in the worker as in the daemon
        listed = {plugin.name: plugin.error or "" for plugin in esper.plugins().plugins}
        for name in raising.names():
            assert f"chaos: {name.rpartition('_')[0]} raises" in listed[name]
        assert not (orders.folder / "block").exists()


FAR_CLIENT = """
import json, sys
from esperd.errors import AskTimeout
from esperd.sync_client import SyncClient

wanted, endpoint, server, mine = sys.argv[1:]
with SyncClient(endpoint, 1.0, 60.0, server_key=server, client_key=mine) as esper:
    print("connected", flush=True)
    sys.stdin.readline()
    tries = 0
    while True:
        tries += 1
        try:
            handle = esper.submit(json.loads(wanted), idempotency_key="once")
            break
        except AskTimeout:
            print("unheard", flush=True)
    print(handle.id, flush=True)
    seen = [event.sequence for event in handle.watch()]
    print(json.dumps({"tries": tries, "whole": seen == list(range(1, len(seen) + 1))}), flush=True)
"""


@pytest.mark.timeout(600)
def test_a_line_that_is_cut_between_client_and_daemon_heals_by_itself_and_nothing_is_submitted_twice(tmp_path):
    state = tmp_path / "state"
    config, access = open_to_far(state, tmp_path / "keys", CONFIG)
    wanted = {"host": "mlp", "data": "digits", "workdir": str(tmp_path), "budget": {"epochs": 10**6}}
    try:
        with (
            two_hosts() as hosts,
            running_daemon(state, config, python=hosts.near_python(tmp_path)) as daemon,
            daemon.sync_client() as here,
            hosts.on(
                hosts.far, "-c", FAR_CLIENT, json.dumps(wanted), access.listen, access.server_key, str(access.client_key)
            ) as client,
        ):
            assert client.stdout is not None
            assert client.stdin is not None
            assert client.stdout.readline() == "connected\n"
            hosts.cut()
            client.stdin.write("submit\n")
            client.stdin.flush()
            assert client.stdout.readline() == "unheard\n"
            hosts.heal()
            while (line := client.stdout.readline()) == "unheard\n":
                pass
            hosts.cut()
            (job,) = here.jobs()
            assert line == f"{job.id}\n"
            here.job(job.id).cancel()
            hosts.heal()
            told = json.loads(client.stdout.readline())
            assert told["tries"] > 1
            assert told["whole"]
    except NoNamespaces as error:
        if os.geteuid() == 0:
            pytest.skip(f"root may not make network namespaces here: {error}")
        pytest.skip("only root makes network namespaces")
