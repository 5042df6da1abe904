"""A daemon on the network, seen through the command line and the client: keys, events, revocation, metrics."""

from __future__ import annotations

import json
import stat
import urllib.request
from pathlib import Path

import pytest
from test_keys_and_gate import free_endpoint

from esperd.cli.client import esper
from esperd.cli.exit_codes import BAD_INPUT, OK, run
from esperd.config import Config, Jobs, Limits, Network
from esperd.errors import AuthenticationFailed, ConfigError, MalformedMessage, NotAllowed
from esperd.sync_client import SyncClient
from esperd.testing import DaemonProcess, running_daemon


def answered(daemon: DaemonProcess) -> int:
    """Requests, as the status counts them."""
    with urllib.request.urlopen(f"{daemon.http_url}/v1/status", timeout=10) as status:
        return int(json.load(status)["requests"]["answered"])


def test_a_daemon_on_the_network_serves_whom_it_was_told_to_and_nobody_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, mine = tmp_path / "state", tmp_path / "keys" / "me.key"
    here = ["--state-dir", str(state), "--json"]

    def told(*words: str, status: int = OK) -> dict[str, object]:
        assert run(esper, words) == status
        printed = capsys.readouterr()
        return json.loads(printed.out or printed.err)

    # keys are made, shown by fingerprint, allowed and revoked without a daemon
    public = told("keys", "create", "me", "--directory", str(mine.parent), "--json")["public_key"]
    server = told("keys", "create", "--server", *here)["public_key"]
    assert mine.read_text().split()[1] not in json.dumps([public, server])
    assert stat.S_IMODE(mine.stat().st_mode) == stat.S_IMODE((state / "keys" / "server.key").stat().st_mode) == 0o600
    told("keys", "allow", "me", str(public), *here)
    listed = told("keys", "list", *here)
    assert listed["server"]["public_key"] == server  # type: ignore[index]
    assert [row["name"] for row in listed["allowed"]] == ["me"]  # type: ignore[attr-defined]
    assert told("keys", "allow", "me", "nonsense", *here, status=BAD_INPUT)["error"]["code"] == "invalid_config"  # type: ignore[index]

    listen, events = free_endpoint(), free_endpoint()
    config = Config(
        network=Network(listen=listen, events=events), jobs=Jobs(allowed_modules=("mylab",)), limits=Limits(request_bytes=4096)
    )
    with running_daemon(state, config) as daemon:
        arguments = {"server_key": str(server), "client_key": mine}
        with SyncClient(listen, **arguments) as remote:  # type: ignore[arg-type]
            assert remote.daemon.pid == daemon.pid
            assert (remote.daemon.events_endpoint, remote.daemon.largest_request_bytes) == (events, 4096)
            before = answered(daemon)
            assert [remote.actors().actors != () for _ in range(5)] == [True] * 5
            assert answered(daemon) >= before + 5
            with pytest.raises(MalformedMessage, match=r"limits\.request_bytes = 4096"):
                remote.job("x" * 100_000).info()  # more than ZeroMQ would let in: refused before it is sent
            with pytest.raises(NotAllowed, match="mylab"):
                remote.submit({"host": "networks:small", "data": "digits", "budget": {"epochs": 1}, "workdir": str(tmp_path)})
            handle = remote.submit({"host": "mlp", "data": "digits", "budget": {"epochs": 10**6}, "workdir": str(tmp_path)})
            handle.cancel()
            assert list(handle.watch())[-1].body.state == "cancelled"  # type: ignore[union-attr]
            assert told("jobs", "--json", "--endpoint", listen, "--server-key", str(server), "--client-key", str(mine))["jobs"]
            told("keys", "revoke", "me", *here)
            with pytest.raises(AuthenticationFailed):
                remote.actors()
        with pytest.raises(AuthenticationFailed, match="esper keys allow"), SyncClient(listen, **arguments):  # type: ignore[arg-type]
            pass
        with daemon.sync_client() as local:
            assert local.actors().actors
        metrics = urllib.request.urlopen(f"{daemon.http_url}/metrics", timeout=10).read().decode()
        assert 'esperd_clients_refused_total{reason="unknown_key"}' in metrics
        assert '"reason": "unknown_key"' in daemon.log()
        secrets = [mine.read_text().split()[1], (state / "keys" / "server.key").read_text().split()[1]]
        assert not [secret for secret in secrets if secret in daemon.log()]
    open_to_all = Config(network=Network(listen=listen.replace("127.0.0.1", "0.0.0.0")))
    with pytest.raises(ConfigError, match="nobody is allowed"), running_daemon(state, open_to_all):
        pass
