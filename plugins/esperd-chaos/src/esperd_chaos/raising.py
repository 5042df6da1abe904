"""A plugin for each hook of esperd, which raises in it and does nothing else. No entry point names them; see :func:`install`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

from esperd import hookimpl, hookspecs

KINDS: Mapping[str, type[BaseException]] = {"error": RuntimeError, "exit": SystemExit}
"""What is raised: what code that is wrong raises, and what one raises that gives up on its own process."""
HOOKS = tuple(name for name in vars(hookspecs) if name.startswith("esperd_"))
"""Every hook that there is."""


def names() -> Iterator[str]:
    """Of all plugins: ``HOOK_KIND``."""
    for hook in HOOKS:
        for kind in KINDS:
            yield f"{hook}_{kind}"


def install(folder: Path) -> None:
    """Leave in a folder what pip leaves of a package with all these plugins; the folder must be on ``PYTHONPATH``."""
    metadata = folder / "raising-0.1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: raising\nVersion: 0.1\n", encoding="utf-8")
    listed = "".join(f"{name} = esperd_chaos.raising:{name}\n" for name in names())
    (metadata / "entry_points.txt").write_text(f"[esperd]\n{listed}", encoding="utf-8")


def _plugin(hook: str, kind: str) -> object:
    def raises(**_arguments: object) -> None:
        raise KINDS[kind](f"chaos: {hook} raises")

    raises.__name__ = hook
    implementation: Callable[..., None] = hookimpl(raises)
    return SimpleNamespace(**{hook: implementation})


globals().update({name: _plugin(*name.rsplit("_", 1)) for name in names()})
