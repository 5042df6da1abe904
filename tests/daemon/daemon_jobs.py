"""Jobs of a user with a folder of their own (``project``), and a daemon that loses no time."""

from __future__ import annotations

from pathlib import Path

from esperd.config import Config, Jobs, Workers

PROJECT = Path(__file__).parent / "project"

QUICK = Config(jobs=Jobs(max_running=2, backoff_s=0.05, backoff_max_s=0.1))
"""Two workers at a time; a lost one is replaced at once."""

SHORT_HEARTBEATS = Config(
    jobs=Jobs(backoff_s=0.05, backoff_max_s=0.1), workers=Workers(heartbeat_interval_s=0.2, heartbeat_timeout_s=3.0)
)
"""A worker soon sees that its daemon died; not so soon that a busy machine looks like a dead one."""

ENDLESS = 1_000_000


def job(epochs=ENDLESS, **changes):
    """A job as a dictionary, as it would stand in a file; without growth unless ``changes`` say otherwise."""
    tables = {
        "host": "networks:small",
        "data": "samples:clouds",
        "workdir": str(PROJECT),
        "batch_size": 32,
        "checkpoint_every_s": 0.0,
        "budget": {"epochs": epochs},
        "growth": {"enabled": False},
    }
    return tables | changes


GROWTH = {
    "blueprints": ["mlp_low*"],
    "incubation_epochs": 1,
    "blending_epochs": 1,
    "shadowing_epochs": 1,
    "probation_epochs": 2,
    "embargo_epochs": 0,
}
"""The shortest life of a seed, of one blueprint: one kernel to compile."""
