"""Loads plugins one by one, so that a broken one is listed with its traceback and never takes the daemon down.

pluggy offers no isolation: its entry-point loader stops at the first import error, and one raising implementation fails the
whole hook call. Here every plugin is imported, and every hook of it called, on its own.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import importlib.metadata
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import pluggy

from esperd import hookspecs
from esperd.declarations import (
    AlphaSchedule,
    Blueprint,
    Dataset,
    Declaration,
    Gate,
    Host,
    Strategy,
    SurgeryOperation,
    Trigger,
)
from esperd.errors import UnknownName
from esperd.messages.control import PluginRecord

ENTRY_POINT_GROUP = "esperd"

BUILTIN_PLUGINS = (
    "esperd.builtins.blueprints",
    "esperd.builtins.strategies",
    "esperd.builtins.triggers",
    "esperd.builtins.gates",
    "esperd.builtins.surgery",
    "esperd.builtins.hosts",
    "esperd.builtins.datasets",
    "esperd.builtins.schedules",
)
"""Everything built in comes through the same door as third-party plugins."""

DeclarationT = TypeVar("DeclarationT", bound=Declaration)

_KINDS: dict[str, type[Any]] = {
    "blueprints": Blueprint,
    "strategies": Strategy,
    "triggers": Trigger,
    "gates": Gate,
    "surgery_operations": SurgeryOperation,
    "hosts": Host,
    "datasets": Dataset,
    "alpha_schedules": AlphaSchedule,
}
_SINGULAR = {"strategies": "strategy"}
"""Kinds of which one is not called by the same word without its last letter."""


class Registry(Mapping[str, DeclarationT], Generic[DeclarationT]):
    """Declarations of one kind by name; a missing name is an error that suggests the nearest and lists what exists."""

    def __init__(self, kind: str, entries: Mapping[str, DeclarationT]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> DeclarationT:
        """Return the declaration.

        Raises:
            UnknownName: when nothing is registered under ``name``.
        """
        if name not in self._entries:
            available = sorted(self._entries)
            nearest = difflib.get_close_matches(name, available, n=1)
            listed = f"there are: {', '.join(available)}"
            raise UnknownName(
                f"no {_SINGULAR.get(self.kind, self.kind.removesuffix('s')).replace('_', ' ')} is called {name!r}; "
                + (f"did you mean {nearest[0]!r}? ({listed})" if nearest else listed),
                kind=self.kind,
                name=name,
                available=available,
            )
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def matching(self, patterns: Sequence[str]) -> list[DeclarationT]:
        """Declarations whose names match any of the shell patterns, in order of registration; all of them for none.

        Raises:
            UnknownName: when a pattern matches nothing.
        """
        if not patterns:
            return list(self._entries.values())
        chosen: dict[str, DeclarationT] = {}
        for pattern in patterns:
            found = [name for name in self._entries if fnmatch.fnmatchcase(name, pattern)]
            if not found:
                self[pattern]
            chosen.update({name: self._entries[name] for name in found})
        return list(chosen.values())


@dataclass
class _Loaded:
    """A plugin as it stands after loading."""

    name: str
    distribution: str | None
    registered: dict[str, list[str]] = field(default_factory=dict)
    error: str | None = None


class Plugins:
    """Everything registered, by kind, and what became of each plugin."""

    blueprints: Registry[Blueprint]
    strategies: Registry[Strategy]
    triggers: Registry[Trigger]
    gates: Registry[Gate]
    surgery_operations: Registry[SurgeryOperation]
    hosts: Registry[Host]
    datasets: Registry[Dataset]
    alpha_schedules: Registry[AlphaSchedule]

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager("esperd")
        self._manager.add_hookspecs(hookspecs)
        self._loaded: list[_Loaded] = []
        self._registered: dict[str, _Loaded] = {}
        self._entries: dict[str, dict[str, Any]] = {kind: {} for kind in _KINDS}
        self._origins: dict[tuple[str, str], _Loaded] = {}

    def add(self, name: str, plugin: object, distribution: str | None = None) -> None:
        """Register one plugin and collect its declarations; a failure is recorded, not raised."""
        loaded = _Loaded(name=name, distribution=distribution)
        self._loaded.append(loaded)
        try:
            self._manager.register(plugin, name=name)
        except Exception:  # noqa: BLE001 - whatever a plugin raises is its listing, not our end
            loaded.error = traceback.format_exc()
            return
        self._registered[name] = loaded
        try:
            self._manager.check_pending()
            collected = {kind: self._collect(kind, plugin) for kind in _KINDS}
        except (Exception, SystemExit):  # noqa: BLE001 - as above; some end the interpreter when something is missing
            loaded.error = traceback.format_exc()
            self._manager.unregister(name=name)
            return
        for kind, declarations in collected.items():
            for declaration in declarations:
                self._entries[kind][declaration.name] = declaration
                self._origins[kind, declaration.name] = loaded
            if declarations:
                loaded.registered[kind] = [declaration.name for declaration in declarations]

    def add_failure(self, name: str, distribution: str | None, error: str) -> None:
        """List a plugin that could not even be imported."""
        self._loaded.append(_Loaded(name=name, distribution=distribution, error=error))

    def notify(self, hook: str, **arguments: object) -> None:
        """Call an observing hook of every plugin, each on its own; a raising one is listed with its traceback."""
        for implementation in getattr(self._manager.hook, hook).get_hookimpls():
            try:
                implementation.function(**{name: arguments[name] for name in implementation.argnames})
            except (Exception, SystemExit):  # noqa: BLE001 - an observer may not disturb what it observes
                self._registered[implementation.plugin_name].error = traceback.format_exc()

    def distribution_of(self, kind: str, name: str) -> str | None:
        """Package name and version that registered ``name``; None for what is built in."""
        return self._origins[kind, name].distribution

    def records(self) -> tuple[PluginRecord, ...]:
        """One record per plugin, in order of loading."""
        return tuple(
            PluginRecord(name=loaded.name, distribution=loaded.distribution, registered=loaded.registered, error=loaded.error)
            for loaded in self._loaded
        )

    def __getattr__(self, kind: str) -> Registry[Any]:
        entries = self.__dict__.get("_entries", {})
        if kind not in entries:
            raise AttributeError(kind)
        return Registry(kind, entries[kind])

    def _collect(self, kind: str, plugin: object) -> list[Any]:
        """What one plugin declares of one kind.

        Raises:
            TypeError: when it returns something that is not a declaration of this kind.
            ValueError: when a name is taken.
        """
        hook = getattr(self._manager.hook, f"esperd_{kind}")
        declarations: list[Any] = []
        for implementation in hook.get_hookimpls():
            if implementation.plugin is not plugin:
                continue
            for declaration in implementation.function() or ():
                if not isinstance(declaration, _KINDS[kind]):
                    raise TypeError(f"esperd_{kind} must return {_KINDS[kind].__name__}s, got {declaration!r}")
                if not isinstance(declaration.name, str) or not declaration.name:
                    raise TypeError(f"a name must be a string that is not empty, got {declaration.name!r} in {declaration!r}")
                if declaration.name in self._entries[kind] or declaration.name in {d.name for d in declarations}:
                    raise ValueError(f"the name {declaration.name!r} is already taken among {kind}")
                declarations.append(declaration)
        return declarations


def load_plugins(blocked: Sequence[str] = ()) -> Plugins:
    """Load what is built in, then every installed entry point of the group ``esperd``.

    Args:
        blocked: names of entry points not to load.
    """
    plugins = Plugins()
    for module in BUILTIN_PLUGINS:
        plugins.add(module.removeprefix("esperd."), importlib.import_module(module))
    for entry_point in sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name):
        if entry_point.name in blocked:
            continue
        distribution = f"{entry_point.dist.name} {entry_point.dist.version}" if entry_point.dist else None
        try:
            module = entry_point.load()
        except (Exception, SystemExit):  # noqa: BLE001 - whatever a plugin raises on import is its listing
            plugins.add_failure(entry_point.name, distribution, traceback.format_exc())
            continue
        plugins.add(entry_point.name, module, distribution)
    return plugins
