"""Key pairs of CURVE (Curve25519): made, kept in files, named, and told apart by fingerprints. A secret key is never shown.

A secret key's file holds ``esperd-secret-1 HEX`` and has mode 0600; a public key's holds ``esperd-public-1 HEX``. Hexadecimal,
because ZeroMQ's own Z85 is full of characters that a shell understands otherwise.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
import time
from pathlib import Path

import msgspec
import zmq
from zmq.utils import z85

from esperd.errors import ConfigError, Conflict, UnknownName

KEY_BYTES = 32
SECRET_FORM = "esperd-secret-1"  # noqa: S105 - the name of a file format
PUBLIC_FORM = "esperd-public-1"
OTHERS = 0o077
ROOT = 0
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
READ_AGAIN_S = 0.5
"""How long the content of a file that was written over in place may be believed; chosen, not measured."""
SETTLED_NS = 2_000_000_000
"""Age of a directory's time of change from which it tells every further change apart: FAT's is the coarsest, 2 s."""
SERVER_KEY_VARIABLE = "ESPERD_SERVER_KEY"
CLIENT_KEY_VARIABLE = "ESPERD_CLIENT_KEY"
SECRET_SUFFIX = ".key"  # noqa: S105 - the end of a file name
PUBLIC_SUFFIX = ".pub"


class KeyPair(msgspec.Struct, frozen=True):
    """A public key and the secret one that belongs to it, 32 bytes each. Its ``repr`` shows the public one only."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        return f"KeyPair(fingerprint={fingerprint(self.public)!r})"


class ClientSecurity(msgspec.Struct, frozen=True):
    """What a client needs to speak CURVE: its own pair, and the key the server must prove to have."""

    keys: KeyPair
    server_public: bytes


def fingerprint(public: bytes) -> str:
    """Sixteen hexadecimal digits that tell a public key from every other: the head of its SHA-256."""
    return hashlib.sha256(public).hexdigest()[:16]


def new_pair() -> KeyPair:
    """A fresh pair, from libsodium's generator."""
    public, secret = zmq.curve_keypair()
    return KeyPair(z85.decode(public), z85.decode(secret))


def checked_name(name: str) -> str:
    """A name that may become a file's.

    Raises:
        ConfigError: when it has anything but letters, digits, dots, dashes and underscores, or begins with one of the latter.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is not a name for a key: up to 64 letters, digits, dots, dashes and underscores, a letter or digit first",
            key="name",
        )
    return name


def create_pair(path: Path) -> KeyPair:
    """Make a pair and keep its secret key in a new file of mode 0600.

    Raises:
        Conflict: when the file exists: a key is never overwritten.
        ConfigError: when it cannot be written.
    """
    pair = new_pair()
    try:
        _make_directory(path.parent)
        _publish(path, f"{SECRET_FORM} {pair.secret.hex()}\n", replace=False)
    except FileExistsError as error:
        raise Conflict(f"{path} exists, and no key is overwritten; choose another name, or remove it", path=str(path)) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", path=str(path)) from error
    return pair


def read_pair(path: Path) -> KeyPair:
    """The pair whose secret key a file holds.

    Raises:
        ConfigError: when it cannot be read, others may read it, or it holds no secret key. What it holds is not shown.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(1024)
    except OSError as error:
        raise ConfigError(f"the key {path} cannot be read: {error.strerror}", path=str(path)) from error
    if mode & OTHERS:
        raise ConfigError(f"the key {path} has mode {mode:04o}: others may use it; chmod 600 {path}", path=str(path))
    secret = _key_in(text, SECRET_FORM)
    if secret is None:
        raise ConfigError(f"{path} holds no secret key of esperd; `esper keys create NAME` makes one", path=str(path))
    return KeyPair(z85.decode(zmq.curve_public(z85.encode(secret))), secret)


def open_pair(path: Path) -> KeyPair:
    """The pair in a file, made at first use; two processes that make it at once agree on one.

    Raises:
        ConfigError: as :func:`read_pair`.
    """
    if not path.exists():  # what is there is read on a disk that takes nothing, too
        with contextlib.suppress(Conflict):
            return create_pair(path)
    return read_pair(path)


def public_key(told: str) -> bytes:
    """A public key, told as 64 hexadecimal digits or as the path of a file that holds it.

    Raises:
        ConfigError: when it is neither. A secret key's file is refused by name.
    """
    if re.fullmatch(r"[0-9a-fA-F]{64}", told):
        return bytes.fromhex(told)
    try:
        text = Path(told).expanduser().read_bytes()[:1024]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{told!r} is neither a public key, 64 hexadecimal digits, nor a file with one", value=told) from error
    if _key_in(text, SECRET_FORM) is not None:
        raise ConfigError(f"{told} holds a secret key: it belongs to its owner alone; give the public one", path=told)
    public = _key_in(text, PUBLIC_FORM)
    if public is None:
        raise ConfigError(f"{told} holds no public key of esperd", path=told)
    return public


def write_public(path: Path, public: bytes) -> None:
    """Keep a public key in a file, replacing what is there.

    Raises:
        ConfigError: when it cannot be written.
    """
    try:
        _make_directory(path.parent)
        _publish(path, f"{PUBLIC_FORM} {public.hex()}\n", replace=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", path=str(path)) from error


def security_of(endpoint: str, server_key: str | None, client_key: os.PathLike[str] | str | None) -> ClientSecurity | None:
    """What a client was told, as arguments or variables, read.

    Args:
        endpoint: of the daemon; keys count for ``tcp://`` only.
        server_key: the server's public key, 64 hexadecimal digits or a file; None: ``$ESPERD_SERVER_KEY``.
        client_key: the file of the client's own secret key; None: ``$ESPERD_CLIENT_KEY``.

    Returns:
        None: the client speaks without keys.

    Raises:
        ConfigError: when one of them is no such key, or only one is given.
    """
    if endpoint.startswith("ipc://"):
        return None
    server, own = server_key or os.environ.get(SERVER_KEY_VARIABLE), client_key or os.environ.get(CLIENT_KEY_VARIABLE)
    if server is None and own is None:
        return None
    if server is None or own is None:
        missing = f"--server-key or ${SERVER_KEY_VARIABLE}" if server is None else f"--client-key or ${CLIENT_KEY_VARIABLE}"
        raise ConfigError(f"a daemon on the network is spoken to with two keys, and one is missing: {missing}", key=missing)
    return ClientSecurity(read_pair(Path(own).expanduser()), public_key(server))


class AllowList:
    """The clients that may connect: one file ``NAME.pub`` each, in a directory. Read anew whenever the directory changed, and at
    least every half second.

    Args:
        directory: of the files; it need not exist: nobody is allowed then.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._read_at_ns = 0
        self._changed_ns = -1
        self._read_again_s = 0.0
        self._known: dict[bytes, str] = {}
        self.skipped: dict[str, str] = {}
        """Files that allow nobody though they are called as if they did, by their names, and why; as :meth:`names` found them."""

    def names(self) -> dict[bytes, str]:
        """Who is allowed now: names by public key. A file that holds no key, or cannot be read, allows nobody, and
        is in :attr:`skipped`.

        Raises:
            OSError: when the directory is there and cannot be read.
        """
        try:
            changed_ns = self.directory.stat().st_mtime_ns
        except FileNotFoundError:
            return {}
        # A second change may bear the same time as the one that was read: only what had settled by then is trusted.
        settled = changed_ns == self._changed_ns and self._read_at_ns - changed_ns >= SETTLED_NS
        # A file that was written over changes nothing of its directory.
        if not settled or time.monotonic() - self._read_again_s > READ_AGAIN_S:
            read_at_ns, read_again_s = time.time_ns(), time.monotonic()
            self._known = self._read()
            # Not before: what cannot be read must not count as read, and let in whom it let in before.
            self._read_at_ns, self._changed_ns, self._read_again_s = read_at_ns, changed_ns, read_again_s
        return self._known

    def _read(self) -> dict[bytes, str]:
        found: dict[bytes, str] = {}
        skipped: dict[str, str] = {}
        with contextlib.suppress(FileNotFoundError):
            for path in sorted(self.directory.iterdir()):
                if path.suffix == PUBLIC_SUFFIX and NAME.fullmatch(path.stem):
                    try:
                        found[public_key(str(path))] = path.stem
                    except ConfigError as error:
                        cause = error.__cause__
                        skipped[path.name] = (cause.strerror if isinstance(cause, OSError) else None) or "it holds no public key"
        self.skipped = skipped
        return found

    def allow(self, name: str, public: bytes) -> None:
        """Allow a client from now on.

        Raises:
            Conflict: when the name belongs to another key, or the key to another name.
            ConfigError: when the name is none, or the file cannot be written.
        """
        checked_name(name)
        for known, other in self.names().items():
            if (known == public) != (other == name):
                raise Conflict(
                    f"{other} has the key {fingerprint(known)} already; `esper keys revoke {other}` first, or take another name",
                    name=other,
                    fingerprint=fingerprint(known),
                )
        write_public(self.directory / f"{name}{PUBLIC_SUFFIX}", public)

    def revoke(self, name: str) -> bytes:
        """Allow a client no more; returns the key that was its.

        Raises:
            UnknownName: when nobody of that name is allowed; lists who is.
            ConfigError: when the file cannot be removed.
        """
        known = self.names()
        for public, other in known.items():
            if other == name:
                try:
                    (self.directory / f"{checked_name(name)}{PUBLIC_SUFFIX}").unlink()
                except OSError as error:
                    raise ConfigError(f"the key of {name} cannot be removed: {error.strerror}", name=name) from error
                return public
        raise UnknownName(f"no client called {name!r} is allowed; there are: {', '.join(known.values()) or 'none'}", name=name)


def _key_in(text: bytes, form: str) -> bytes | None:
    words = text.decode("ascii", errors="replace").split()
    if len(words) != 2 or words[0] != form or not re.fullmatch(r"[0-9a-fA-F]{64}", words[1]):
        return None
    return bytes.fromhex(words[1])


def _make_directory(path: Path) -> None:
    """Make a directory, and those it lies in, for their owner alone: if root makes them, for whoever owns what they lie in."""
    if path.is_dir():
        return
    _make_directory(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
        if os.geteuid() == ROOT:
            around = path.parent.stat()
            os.chown(path, around.st_uid, around.st_gid, follow_symlinks=False)


def _publish(path: Path, text: str, *, replace: bool) -> None:
    """Let a whole file of mode 0600 appear under its name, or none. If root makes it, for a service of somebody else, it belongs
    to whoever owns its directory: only root could read it otherwise.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            if os.geteuid() == ROOT:
                around = path.parent.stat()
                os.fchown(file.fileno(), around.st_uid, around.st_gid)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            path.hardlink_to(temporary)
    finally:
        temporary.unlink(missing_ok=True)
