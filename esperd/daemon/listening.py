"""Why an address cannot be listened on: because it is wrong, or because of how things stand at this moment."""

from __future__ import annotations

import errno
import socket

import zmq

from esperd.errors import AddressUnavailable, ConfigError

FOR_GOOD = frozenset(
    {errno.EACCES, errno.EPERM, errno.EINVAL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.EOPNOTSUPP, socket.EAI_NONAME}
)
"""What no waiting changes: a port that only root may have, an address that is none, for http.host a name that nobody has."""
NOT_UP = frozenset({errno.EADDRNOTAVAIL, errno.ENODEV, errno.ENETDOWN, errno.ENETUNREACH, socket.EAI_AGAIN})
"""What an interface, or a name server, says that is not there yet; ``bind(2)``, ``zmq_bind(3)``, ``getaddrinfo(3)``."""


def cannot_listen(where: str, error: OSError | zmq.ZMQError, *, another: str, key: str) -> ConfigError | AddressUnavailable:
    """The error that says that an address cannot be listened on, and whether that may pass.

    Args:
        where: the beginning of its message: which address.
        error: of the operating system, or ZeroMQ's.
        another: what to do when it should be another address.
        key: of the configuration.
    """
    # What pyzmq makes of it names the address once more.
    why = zmq.strerror(error.errno or 0) if isinstance(error, zmq.ZMQError) else error.strerror
    told = f"{where}: {why}"
    if error.errno in FOR_GOOD:
        return ConfigError(f"{told}; {another}", key=key)
    if error.errno in NOT_UP:
        why = "no interface that is up has this address, or its name is not known here"
        return AddressUnavailable(f"{told}: {why}; another try finds it when that changes", key=key)
    if error.errno == errno.EADDRINUSE:
        return AddressUnavailable(f"{told}; end what listens there, or {another}", key=key)
    return AddressUnavailable(f"{told}; another try may find otherwise", key=key)
