"""Blueprints whose factory does not import: what a plugin does wrong costs its own arms, and no job that did not ask for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import structlog

from esperd.declarations import resolve
from esperd.errors import ImportFailed
from esperd.plugins import Plugins

log = structlog.get_logger()


def broken_factories(plugins: Plugins, wanted: Sequence[str], topologies: Collection[str]) -> Mapping[str, str]:
    """Import the factory of every blueprint that a job may grow.

    Args:
        plugins: what is installed.
        wanted: the job's ``growth.blueprints``.
        topologies: of the job's slots; blueprints of others are left alone.

    Returns:
        Blueprint → why it cannot be grown, for those that do not import.

    Raises:
        ImportFailed: when the job names such a blueprint itself, and not by a pattern; names blueprint and package.
        UnknownName: when a pattern matches nothing.
    """
    broken = {}
    for blueprint in plugins.blueprints.matching(wanted):
        if blueprint.topology not in topologies:
            continue
        try:
            resolve(blueprint.factory)
        except ImportFailed as error:
            package = plugins.distribution_of("blueprints", blueprint.name) or "esperd itself"
            reason = f"the factory of blueprint {blueprint.name!r}, from {package}, does not import: {error}"
            if blueprint.name in wanted:
                raise ImportFailed(
                    f"{reason}; repair or update that package, or take the blueprint out of growth.blueprints",
                    **{**error.fields, "blueprint": blueprint.name, "distribution": package},
                ) from error
            log.warning("a blueprint cannot be grown", blueprint=blueprint.name, distribution=package, error=str(error))
            broken[blueprint.name] = reason
    return broken
