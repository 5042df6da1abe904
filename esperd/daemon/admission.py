"""What is checked about a job before it is admitted: everything that needs neither torch nor the user's code."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import anyio
import msgspec

import esperd
from esperd.errors import InvalidJob
from esperd.jobfile import contradiction_in
from esperd.messages.jobs import Job
from esperd.plugins import Plugins

PROBE = "import esperd.messages, sys; sys.stdout.write(esperd.__version__)"
"""More than the bare package, so that an esperd without its dependencies is found out; torch would take seconds."""
HOLDERS = (msgspec.Struct, dict, list, tuple)
"""What a job's values may lie in."""
LONGEST_STEP = 60
"""Characters told of one key on the way to a place."""
PROBE_TIMEOUT_S = 8.0
"""Less than a client waits for an answer, so that it hears which interpreter hangs; chosen, not measured."""


def check_job(job: Job, plugins: Plugins) -> None:
    """Refuse a job that cannot run whatever its model and data are.

    Raises:
        InvalidJob: no limit in the budget, a split that leaves nothing, a workdir or data file that does not exist, values that
            contradict each other.
        UnknownName: a host, data set, blueprint, strategy, trigger or alpha schedule that nothing registered; lists what exists.
    """
    if job.budget.epochs is None and job.budget.flops is None and job.budget.seconds is None:
        raise InvalidJob("a job needs a limit: set budget.epochs, budget.flops or budget.seconds", key="budget")
    if job.split.gate + job.split.audit >= 1.0:
        raise InvalidJob(f"split.gate {job.split.gate} and split.audit {job.split.audit} leave nothing to train on", key="split")
    if contradiction := contradiction_in(job):
        steps, told = contradiction
        key = ".".join(map(str, steps))
        raise InvalidJob(f"{key}: {told}", key=key)
    workdir = Path(job.workdir)
    if not workdir.is_absolute() or not workdir.is_dir():
        raise InvalidJob(f"workdir {job.workdir!r} is not a directory on the daemon's machine", key="workdir")
    if ":" not in job.host:
        plugins.hosts[job.host]
    if job.data.endswith(".npz"):
        if not (workdir / job.data).is_file():
            raise InvalidJob(f"data file {workdir / job.data} does not exist", key="data")
    elif ":" not in job.data:
        plugins.datasets[job.data]
    plugins.blueprints.matching(job.growth.blueprints)
    for blueprint in job.gates.blueprints:
        plugins.blueprints[blueprint]
    plugins.strategies[job.policy.strategy]
    plugins.triggers[job.policy.trigger]
    plugins.alpha_schedules[job.growth.alpha_schedule]


def check_keys(job: Job) -> None:
    """Refuse options with keys that are no text, which TOML and JSON cannot express either. A job is kept, compared and told in
    an order of its keys, and there is none between a text and a number.

    Raises:
        InvalidJob: names the place.
    """
    # No recursion, and nothing is kept but the way to where it stands: what a client sends may be as deep, and as broad, as its
    # decoder bears.
    way: list[tuple[object, Iterator[tuple[object, object]]]] = [("", iter(_inside(job)))]
    while way:
        for key, item in way[-1][1]:
            if isinstance(item, dict):
                for name in item:
                    if not isinstance(name, str):
                        place = ".".join(str(step)[:LONGEST_STEP] for step, _ in [*way[1:], (key, None)])
                        raise InvalidJob(f"{place} has the key {name!r}; keys of options are text", key=place)
            if item and isinstance(item, HOLDERS):
                way.append((key, iter(_inside(item))))
                break
        else:
            way.pop()


def _inside(value: msgspec.Struct | dict[Any, Any] | list[Any] | tuple[Any, ...]) -> Iterable[tuple[object, object]]:
    if isinstance(value, msgspec.Struct):
        return ((field, getattr(value, field)) for field in value.__struct_fields__)
    if isinstance(value, dict):
        return value.items()
    return enumerate(value)


async def check_python(python: str) -> None:
    """Refuse an interpreter the worker could not run under.

    Raises:
        InvalidJob: it does not start, has no esperd, or another version of it.
    """
    try:
        with anyio.fail_after(PROBE_TIMEOUT_S):
            probe = await anyio.run_process([python, "-P", "-c", PROBE], check=False, stderr=subprocess.PIPE)
    except TimeoutError as error:
        raise InvalidJob(f"python {python!r} did not import esperd within {PROBE_TIMEOUT_S:g} s", key="python") from error
    except OSError as error:
        raise InvalidJob(f"python {python!r} does not start: {error.strerror or error}", key="python") from error
    if probe.returncode != 0:
        reason = (probe.stderr or b"").decode(errors="replace").strip().splitlines()
        raise InvalidJob(
            f"python {python!r} cannot import esperd ({reason[-1] if reason else 'no message'}); "
            f"install it there: {python} -m pip install esperd=={esperd.__version__}",
            key="python",
        )
    version = (probe.stdout or b"").decode(errors="replace")
    if version != esperd.__version__:
        raise InvalidJob(
            f"python {python!r} has esperd {version}, this daemon is {esperd.__version__}; install the same version there",
            key="python",
        )
