"""What one client may ask of a server: how large, how often, how much at a time. Pure: time comes in as an argument."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import msgspec

from esperd.errors import Busy, MalformedMessage

REMEMBERED = 1_024
"""Clients after which those that owe nothing are forgotten; chosen, not measured."""


class TokenBucket:
    """So many at once, and so many a second after that.

    Args:
        per_s: tokens that come back every second.
        burst: tokens when it is full, as it is at the start.
        now: seconds on any clock that never goes back.
    """

    def __init__(self, per_s: float, burst: float, now: float) -> None:
        self.per_s = per_s
        self.burst = burst
        self._tokens = burst
        self._at = now

    def take(self, now: float) -> float:
        """Take a token.

        Returns:
            0.0 when there was one; else the seconds until there is, and nothing was taken.
        """
        self._fill(now)
        if self._tokens >= 1.0:
            self._tokens -= 1.0
            return 0.0
        return (1.0 - self._tokens) / self.per_s

    def is_full(self, now: float) -> bool:
        """True when a new one would hold no more."""
        self._fill(now)
        return self._tokens >= self.burst

    def _fill(self, now: float) -> None:
        self._tokens = min(self.burst, self._tokens + max(0.0, now - self._at) * self.per_s)
        self._at = max(self._at, now)


class ClientLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one client may ask."""

    request_bytes: int
    requests_per_s: float
    burst: int
    open_requests: int


def require_small(frames: Sequence[bytes], limit_bytes: int) -> None:
    """Refuse a request that is larger than the daemon's ``limits.request_bytes``.

    Raises:
        MalformedMessage: it is.
    """
    size_bytes = sum(map(len, frames))
    if size_bytes > limit_bytes:
        raise MalformedMessage(
            f"a request of {size_bytes} bytes is larger than the daemon's limits.request_bytes = {limit_bytes}",
            size_bytes=size_bytes,
            limit_bytes=limit_bytes,
        )


class Turnstile:
    """Lets requests in, client by client.

    Args:
        limits: of every client.
    """

    def __init__(self, limits: ClientLimits) -> None:
        self.limits = limits
        self._forget_at = REMEMBERED
        self._buckets: dict[Hashable, TokenBucket] = {}
        self._open: dict[Hashable, int] = {}

    def admit(self, client: Hashable, frames: Sequence[bytes], now: float) -> None:
        """Count a request that arrived, before anything of it is read.

        Raises:
            Busy: when the client asks too often; says when it may again.
            MalformedMessage: when the request is too large.
        """
        bucket = self._buckets.get(client)
        if bucket is None:
            self._forget(now)
            bucket = self._buckets[client] = TokenBucket(self.limits.requests_per_s, self.limits.burst, now)
        wait_s = bucket.take(now)
        if wait_s:
            raise Busy(
                f"this client asks more than limits.requests_per_s = {self.limits.requests_per_s:g}; try again in {wait_s:.3g} s",
                retry_after_s=wait_s,
            )
        require_small(frames, self.limits.request_bytes)

    def enter(self, client: Hashable, retry_after_s: float) -> None:
        """Open a request; :meth:`leave` closes it.

        Raises:
            Busy: when the client has too many open.
        """
        standing = self._open.get(client, 0)
        if standing >= self.limits.open_requests:
            raise Busy(
                f"this client has {standing} requests open, the limit is limits.open_requests; try again in {retry_after_s} s",
                retry_after_s=retry_after_s,
                open=standing,
            )
        self._open[client] = standing + 1

    def leave(self, client: Hashable) -> None:
        """Close a request that :meth:`enter` opened."""
        standing = self._open[client] - 1
        if standing:
            self._open[client] = standing
        else:
            del self._open[client]

    def _forget(self, now: float) -> None:
        if len(self._buckets) >= self._forget_at:
            owing = {client: bucket for client, bucket in self._buckets.items() if not bucket.is_full(now)}
            self._buckets = owing
            self._forget_at = max(REMEMBERED, 2 * len(owing))  # not at every stranger while many owe
