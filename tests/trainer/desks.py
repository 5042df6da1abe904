"""The daemon's side of a training session, in this process: real strategies, real kernels, real blobs, no sockets.

Also the model and the data that session tests train: small, but with everything that makes resuming hard (batch norm's
buffers, dropout's RNG stream), and hard enough to learn that a seed pays.
"""

from __future__ import annotations

import functools
import itertools
import json
import random

import msgspec
import torch
from torch import nn

from esperd.compiler.compile import compile_kernel
from esperd.declarations import resolve
from esperd.errors import ActorUnavailable, KernelRejected
from esperd.messages.growth import COOLDOWN_STAGES
from esperd.messages.jobs import Job
from esperd.messages.kernels import KernelProvided
from esperd.messages.reports import Report
from esperd.messages.telemetry import EpochCompleted, StageChanged
from esperd.plugins import load_plugins
from esperd.policy.trigger import with_signal
from esperd.trainer.passes import Stopped
from esperd.trainer.session import Session

PLUGINS = load_plugins()


@functools.cache
def kernel_for(digest, key):
    return compile_kernel(key, PLUGINS.blueprints[key.blueprint])


class InProcessDesk:
    """Answers a session as the daemon's actors would, and remembers what it was told.

    ``stop`` is asked before every step, with the desk, for a reason to stop. At the decision points in ``policy_away`` the
    policy cannot be reached. With ``kernels`` False none can be provided. ``kernel_errors`` are raised, one after the other, by
    the first attempts to get one.
    """

    def __init__(self, *, stop=lambda _desk: None, policy_away=(), kernels=True, kernel_errors=()):
        self.job_id = "job-1"
        self.stop = stop
        self.policy_away = policy_away
        self.kernels = kernels
        self.kernel_errors = list(kernel_errors)
        self.observations = []
        self.events = []
        self.checkpoints = []
        self.stages = {}
        self.phase = "growth"
        self.steps_in_epoch = 0
        self.decided = []
        self.concluded = []

    def decide(self, request):
        if request.point in self.policy_away:
            raise ActorUnavailable("policy is between two incarnations")
        self.decided.append(request.point)
        self.observations.append(request.observation)
        asked = with_signal(request, PLUGINS.triggers[request.settings.trigger].fires)
        return resolve(PLUGINS.strategies[request.settings.strategy].decide)(asked)

    def conclude(self, ending):
        self.concluded.append(ending)

    def kernel(self, key):
        if not self.kernels:
            raise KernelRejected("the compiler could not prove this kernel's gradients")
        if self.kernel_errors:
            raise self.kernel_errors.pop(0)
        kernel = kernel_for(key.digest(), key)
        return KernelProvided(
            manifest_id=kernel.manifest.identity(),
            manifest=kernel.manifest,
            graph=kernel.graph,
            weights=kernel.weights,
            source="memory",
        )

    def record(self, bodies):
        self.events.extend(bodies)
        for body in bodies:
            if isinstance(body, StageChanged):
                self.stages[body.seed] = body.after
            elif isinstance(body, EpochCompleted):
                self.phase = body.phase
                self.steps_in_epoch = 0

    def checkpoint_written(self, sha256, epoch):
        self.checkpoints.append((sha256, epoch))

    def stop_requested(self):
        return self.stop(self)

    def progressed(self, step):
        self.steps_in_epoch += 1

    def of(self, kind):
        """The events of one kind, in order."""
        return [event for event in self.events if isinstance(event, kind)]


class Ended:
    """What a session left: its desk, its artifacts and its report."""

    def __init__(self, session, outcome):
        self.desk = session.desk
        self.blobs = session.blobs
        self.outcome = outcome
        self.files = {artifact.name: session.blobs.get(artifact.sha256) for artifact in outcome.artifacts}

    @property
    def report(self):
        return msgspec.json.decode(self.files["report.json"], type=Report)

    @property
    def comparable_report(self):
        """The report without what may differ between two runs of one job: durations, and how often it was resumed."""
        told = json.loads(self.files["report.json"])
        for metrics in (told["grown"], told["control"]):
            if metrics is not None:
                metrics.pop("training_seconds")
        told.pop("resumed")
        return told


def train(job, blobs, desk=None, *, resume_from=None, resumed=0, sleep=lambda _seconds: None, plugins=PLUGINS):
    """One attempt at a job, to its end."""
    session = Session(job, plugins, desk or InProcessDesk(), blobs, resumed=resumed, sleep=sleep)
    return Ended(session, session.train(resume_from))


def train_until(job, blobs, stop, *, resume_from=None):
    """One attempt that is stopped. Returns its desk; its last checkpoint is the one to go on from."""
    desk = InProcessDesk(stop=stop)
    try:
        Session(job, PLUGINS, desk, blobs).train(resume_from)
    except Stopped:
        return desk
    raise AssertionError("the job ended before there was a reason to stop it")


def in_stage(stage, *, step=2, why="drain"):
    """A reason to stop: in the middle of the first epoch that some seed spends in this stage."""
    return lambda desk: why if stage in desk.stages.values() and desk.steps_in_epoch == step else None


def after_steps(steps, why="drain"):
    """A reason to stop: from so many steps of this attempt on."""
    taken = itertools.count()
    return lambda _desk: why if next(taken) >= steps else None


def in_control(desk):
    """A reason to stop: in the middle of an epoch of the control."""
    return "drain" if desk.phase == "control" and desk.steps_in_epoch == 2 else None


def at_rest(desk):
    """A reason to stop: while the slot of a culled seed cools down."""
    return "drain" if set(desk.stages.values()) & COOLDOWN_STAGES and desk.steps_in_epoch == 1 else None


class Host(nn.Module):
    """Two convolutions with batch norm, dropout, and a head for three classes."""

    def __init__(self, dropout):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.dropout(self.body(self.stem(x)).mean(dim=(2, 3))))


def host(dropout=0.1):
    return Host(dropout)


class Restless(nn.Module):
    """Draws from Python's stream, and counts its passes in a buffer that no state_dict holds."""

    def __init__(self):
        super().__init__()
        self.flatten, self.head = nn.Flatten(), nn.Linear(36, 3)
        self.register_buffer("passes", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.passes += 1
        return self.head(self.flatten(x)) * (1 + 0.1 * random.random() + 0.01 * self.passes)


class Plain(nn.Sequential):
    """Neither dropout nor batch norm."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3))


def cutting(output, target):
    """A loss that cuts the gradient."""
    return nn.functional.cross_entropy(output.detach(), target, reduction="none")


def no_module():
    return "not a module"


def raising():
    raise RuntimeError("out of ideas")


def leaving(*_arguments, **_options):
    """What a script does that was written to be run by hand."""
    raise SystemExit(3)


def leaving_within():
    """A host whose first pass ends the interpreter."""

    class Leaving(nn.Linear):
        def forward(self, x):
            return leaving(x)

    return Leaving(36, 3)


def unfit():
    """A module that does not run on images."""
    return nn.Linear(7, 3)


def two_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.host = Host(0.0)

        def forward(self, x):
            return self.host(x), x

    return Two()


class Exploding(Host):
    """Answers with infinity once it was trained for a step; or, with ``only_measured``, as soon as it is measured."""

    def __init__(self, only_measured):
        super().__init__(0.0)
        self.only_measured = only_measured

    def forward(self, x):
        trained = bool(self.stem[1].num_batches_tracked > 1)
        broken = not self.training if self.only_measured else trained
        return super().forward(x) * (torch.inf if broken else 1.0)


class Fragile(Host):
    """Answers with infinity once a step has moved its first weights by more than it can bear. From its ``since``-th step on."""

    def __init__(self, limit, since):
        super().__init__(0.0)
        self.limit, self.since = limit, since
        self.register_buffer("before", self.stem[0].weight.detach().clone())
        self.register_buffer("broken", torch.zeros((), dtype=torch.bool))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            now = self.stem[0].weight.detach()
            self.broken |= ((now - self.before).abs().max() > self.limit) & (self.steps > self.since)
            self.before.copy_(now)
            self.steps += 1
        return super().forward(x) * torch.where(self.broken, torch.inf, 1.0)


def fragile(limit, since=0):
    return Fragile(limit, since)


def exploding(only_measured=False):
    return Exploding(only_measured)


def frozen():
    return Host(0.0).requires_grad_(requires_grad=False)


class KeepsAGraph(Host):
    """Keeps on itself what it computed last, and does not detach it."""

    def forward(self, x):
        output = super().forward(x)
        if self.training:
            self.kept = output
        return output


def host_that_keeps_a_graph():
    return KeepsAGraph(0.0)


def images(shift=0, samples=360, labels=3):
    """(N, 1, 6, 6) noise with a stripe whose direction is the class; two are told apart by its width alone."""
    generator = torch.Generator().manual_seed(11 + shift)
    y = torch.arange(samples) % labels
    x = torch.randn(samples, 1, 6, 6, generator=generator)
    rows = torch.randint(0, 5, (samples,), generator=generator)
    for index in range(samples):
        row, label = int(rows[index]), int(y[index]) % 3
        if label == 0:
            x[index, 0, row] += 1.6
        elif label == 1:
            x[index, 0, :, row] += 1.6
        else:
            x[index, 0, row : row + 2, :3] += 1.6
    return x, y


def growing_job(**fields):
    """A job whose seeds pass through every stage within a second."""
    settings = {
        "host": "desks:host",
        "data": "desks:images",
        "batch_size": 48,
        "budget": {"epochs": 9},
        "optimizer": {"learning_rate": 1e-2},
        "growth": {
            "blueprints": ["conv_light", "squeeze_excite"],
            "incubation": "lookahead",
            "incubation_epochs": 1,
            "blending_epochs": 2,
            "shadowing_epochs": 1,
            "probation_epochs": 3,
            "embargo_epochs": 1,
        },
        "policy": {"warmup_epochs": 1, "patience": 1, "rent_parameters": 0.001, "rent_flops": 0.001},
        **fields,
    }
    # one question an epoch, nothing measured first, and growth does not end before the job does
    settings["policy"] = {"strategy": "ucb", "stop_rule": False, **settings["policy"]}
    return msgspec.convert(settings, Job)
