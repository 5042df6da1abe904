"""The blocking twin of :mod:`esperd.client`, for scripts and notebooks without an event loop."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.from_thread

from esperd.client import Client, JobHandle
from esperd.messages.control import ActorList, PluginList, Welcome
from esperd.messages.evidence import EvidenceList
from esperd.messages.failures import FailureAnalysis
from esperd.messages.jobs import Artifact, Job, JobInfo
from esperd.messages.kernels import KernelList
from esperd.messages.overruling import LoggedDecision, Overruled, ProposalList, ReplayedPoint, Wish
from esperd.messages.reports import Report
from esperd.messages.telemetry import Event


class SyncClient:
    """:class:`Client` for code without an event loop: the same methods, blocking. Used as ``with SyncClient() as esper``.

    Args:
        endpoint: as for :class:`Client`.
        timeout_s: as for :class:`Client`.
        patience_s: as for :class:`Client`.
        server_key: as for :class:`Client`.
        client_key: as for :class:`Client`.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        timeout_s: float = 10.0,
        patience_s: float = 15.0,
        *,
        server_key: str | None = None,
        client_key: os.PathLike[str] | str | None = None,
    ) -> None:
        self._make_client = partial(Client, endpoint, timeout_s, patience_s, server_key=server_key, client_key=client_key)
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            self._portal = opening.enter_context(anyio.from_thread.start_blocking_portal())
            self._client = opening.enter_context(self._entered(self._make_client()))
            self._open = opening.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._open.close()

    @property
    def daemon(self) -> Welcome:
        """As :attr:`Client.daemon`."""
        return self._client.daemon

    def submit(
        self, job: Job | Mapping[str, Any] | os.PathLike[str] | str, *, idempotency_key: str | None = None
    ) -> SyncJobHandle:
        """As :meth:`Client.submit`."""

        async def submit() -> JobHandle:
            return await self._client.submit(job, idempotency_key=idempotency_key)

        return SyncJobHandle(self._portal, self._portal.call(submit))

    def jobs(self, limit: int = 100) -> tuple[JobInfo, ...]:
        """As :meth:`Client.jobs`."""
        return self._portal.call(self._client.jobs, limit)

    def job(self, job_id: str) -> SyncJobHandle:
        """As :meth:`Client.job`."""
        return SyncJobHandle(self._portal, self._client.job(job_id))

    def actors(self) -> ActorList:
        """As :meth:`Client.actors`."""
        return self._portal.call(self._client.actors)

    def kernels(self) -> KernelList:
        """As :meth:`Client.kernels`."""
        return self._portal.call(self._client.kernels)

    def plugins(self) -> PluginList:
        """As :meth:`Client.plugins`."""
        return self._portal.call(self._client.plugins)

    def evidence(self, blueprint: str = "*", job: str | None = None) -> EvidenceList:
        """As :meth:`Client.evidence`."""
        return self._portal.call(self._client.evidence, blueprint, job)

    def forget_evidence(self, blueprint: str) -> int:
        """As :meth:`Client.forget_evidence`."""
        return self._portal.call(self._client.forget_evidence, blueprint)

    def _entered(self, client: Client) -> AbstractContextManager[Client]:
        return self._portal.wrap_async_context_manager(client)


class SyncJobHandle:
    """:class:`JobHandle`, blocking."""

    def __init__(self, portal: anyio.from_thread.BlockingPortal, handle: JobHandle) -> None:
        self._portal = portal
        self._handle = handle

    @property
    def id(self) -> str:
        """The job's id."""
        return self._handle.id

    @property
    def duplicate(self) -> bool:
        """As :attr:`JobHandle.duplicate`."""
        return self._handle.duplicate

    def info(self) -> JobInfo:
        """As :meth:`JobHandle.info`."""
        return self._portal.call(self._handle.info)

    def pause(self) -> JobInfo:
        """As :meth:`JobHandle.pause`."""
        return self._portal.call(self._handle.pause)

    def resume(self) -> JobInfo:
        """As :meth:`JobHandle.resume`."""
        return self._portal.call(self._handle.resume)

    def cancel(self) -> JobInfo:
        """As :meth:`JobHandle.cancel`."""
        return self._portal.call(self._handle.cancel)

    def retry(self) -> JobInfo:
        """As :meth:`JobHandle.retry`."""
        return self._portal.call(self._handle.retry)

    def failure(self) -> FailureAnalysis:
        """As :meth:`JobHandle.failure`."""
        return self._portal.call(self._handle.failure)

    def overrule(
        self, wish: Wish, *, slot: str = "", blueprint: str = "", seed: str = "", number: int | None = None, reason: str = ""
    ) -> Overruled:
        """As :meth:`JobHandle.overrule`."""

        async def overrule() -> Overruled:
            return await self._handle.overrule(wish, slot=slot, blueprint=blueprint, seed=seed, number=number, reason=reason)

        return self._portal.call(overrule)

    def proposals(self) -> ProposalList:
        """As :meth:`JobHandle.proposals`."""
        return self._portal.call(self._handle.proposals)

    def decision(self, point: int) -> LoggedDecision:
        """As :meth:`JobHandle.decision`."""
        return self._portal.call(self._handle.decision, point)

    def replay(self) -> tuple[ReplayedPoint, ...]:
        """As :meth:`JobHandle.replay`."""
        return self._portal.call(self._handle.replay)

    def events(self, after: int = 0) -> tuple[Event, ...]:
        """As :meth:`JobHandle.events`."""
        return self._portal.call(self._handle.events, after)

    def watch(self, after: int = 0) -> Generator[Event, None, None]:
        """As :meth:`JobHandle.watch`, as a plain generator."""
        events = self._handle.watch(after)

        async def following() -> Event | None:
            return await anext(events, None)

        with closing(_Closing(self._portal, events)):
            while (event := self._portal.call(following)) is not None:
                yield event

    def wait(self) -> JobInfo:
        """As :meth:`JobHandle.wait`."""
        return self._portal.call(self._handle.wait)

    def report(self) -> Report:
        """As :meth:`JobHandle.report`."""
        return self._portal.call(self._handle.report)

    def artifacts(self) -> tuple[Artifact, ...]:
        """As :meth:`JobHandle.artifacts`."""
        return self._portal.call(self._handle.artifacts)

    def fetch(self, name: str) -> bytes:
        """As :meth:`JobHandle.fetch`."""
        return self._portal.call(self._handle.fetch, name)

    def export(self, directory: os.PathLike[str] | str) -> tuple[Path, ...]:
        """As :meth:`JobHandle.export`."""
        return self._portal.call(self._handle.export, directory)


class _Closing:
    """Closes an async generator from a thread."""

    def __init__(self, portal: anyio.from_thread.BlockingPortal, events: AsyncGenerator[Event, None]) -> None:
        self._portal = portal
        self._events = events

    def close(self) -> None:
        self._portal.call(self._events.aclose)
