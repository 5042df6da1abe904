"""The compiler's process: ``python -m esperd.compiler``, started by a daemon.

Plugins that the daemon blocks must be blocked here too; it says so through ``ESPERD__PLUGINS__BLOCKED``.
"""

from __future__ import annotations

from esperd import tracing
from esperd.actors.actor import Actor
from esperd.actors.leaving import leave
from esperd.actors.serve import serve_actor
from esperd.config import load_config
from esperd.logs import configure_logging
from esperd.plugins import Plugins, load_plugins


def main() -> None:
    """Serve until the daemon says stop or is gone."""
    config = load_config()
    configure_logging(config.daemon.log_level)
    plugins = load_plugins(config.plugins.blocked)
    with tracing.exporting(config.telemetry.otlp_endpoint, "esperd compiler"):
        serve_actor(lambda: _make(plugins))


def _make(plugins: Plugins) -> Actor:
    from esperd.compiler.actor import CompilerActor  # torch comes with it: the process says that it lives before

    return CompilerActor(plugins)


if __name__ == "__main__":
    main()
    leave(0)
