"""The registered plan of ``bench/growth.py``: budgets, arms, policies. What stands here is hashed into every line."""

from __future__ import annotations

from typing import Any

import choosing
import improving
import lab
import msgspec
import texts

from esperd.messages.jobs import Growth
from esperd.messages.policy import PolicySettings

VERSION = 2
"""2: what ``grown`` spends before its first step counts for its budget; in version 1 it came on top, 1.6 to 2.3 %. Arms are
measured on plain modules."""
FULL: dict[str, Any] = {
    "batch_size": 128,
    "pretrain_rate": 0.1,
    "rate": 0.1,
    "merit_batches": 4,
    "continued_rates": (0.1, 0.05),
    "h1": {"host_epochs": 40, "extra_host_epochs": 36},
    "h2": {"host_epochs": 12, "arm_epochs": 20},
}
QUICK: dict[str, Any] = {
    **FULL,
    "batch_size": 64,
    "rate": 0.05,
    "continued_rates": (0.05,),
    "h1": {"host_epochs": 3, "extra_host_epochs": 12},
    "h2": {"host_epochs": 3, "arm_epochs": 6},
}
DIGITS: dict[str, Any] = {
    **FULL,
    "batch_size": 64,
    "rate": 0.05,
    "continued_rates": (0.05, 0.1),
    "parts": ("h1",),
    "h2": {"host_epochs": 3, "arm_epochs": 6},
}
"""H1 alone, with the budgets of ``FULL``; registered when the lines of the short form were known."""
TEXT: dict[str, Any] = {
    "batch_size": 32,
    "pretrain_rate": 0.01,
    "rate": 0.01,
    "continued_rates": (0.01, 0.003),
    "from_grown": ("scratch_total", "scratch_marginal"),
    "parts": ("h1",),
    "h1": {"host_epochs": 18, "extra_host_epochs": 24},
    "h2": {},
    "windows": [texts.EPOCH, texts.WINDOWS, texts.CONTEXT, texts.SHARES, texts.GAP],
}
"""H1 alone; the rate was chosen by ``bench/text_tuning.py``."""

STRATEGY = "gradient_merit"
"""The default when all of this was registered: what ``grown`` grows by, and what H2 is read off for."""
POLICY_BEFORE: dict[str, Any] = {
    "strategy": STRATEGY,
    "warmup_epochs": 2,
    "latest_germination": 0.6,
    "max_fossilized": 8,
    "patience": 3,
    "stop_rule": False,
}
GROWTH_BEFORE: dict[str, Any] = {
    "incubation_epochs": 3,
    "blending_epochs": 3,
    "shadowing_epochs": 2,
    "probation_epochs": 4,
    "embargo_epochs": 2,
}
"""Defaults of a job when all of this was registered, of what was changed after ``bench/defaults.py``."""
_ASKED = {
    "strategy": STRATEGY,
    "stop_rule": False,
    "warmup_epochs": 0,
    "latest_germination": 0.4,
    "max_live_seeds": 2,
    "max_fossilized": 2,
    "patience": 2,
}


def policy(**changed: Any) -> PolicySettings:
    """The policy of ``grown``: esperd's default strategy, asked from the first step on, because the host is trained already."""
    return PolicySettings(**{**_ASKED, **changed})


def growth(**changed: Any) -> Growth:
    """How seeds live: esperd's defaults, with shorter stays, because the budget is short."""
    return Growth(**{**improving.STAYS, **changed})


_CHOICE = {**POLICY_BEFORE, "warmup_epochs": 0, "latest_germination": 1.0}
PICKING: dict[str, PolicySettings] = {
    "first_arm": PolicySettings(**{**_CHOICE, "strategy": "first_arm"}),
    STRATEGY: PolicySettings(**_CHOICE),
    "successive_halving": PolicySettings(**{**_CHOICE, "strategy": "successive_halving", "contest_share": 0.5, "contenders": 12}),
}
"""Strategies that choose one of the arms. ``uniform`` needs no runs: it is the mean over all arms."""

ABLATIONS: dict[str, tuple[PolicySettings, Growth]] = {
    "ucb": (policy(strategy="ucb"), growth()),
    "successive_halving": (policy(strategy="successive_halving"), growth()),
    "uniform": (policy(strategy="uniform"), growth()),
    "no_rent": (policy(rent_parameters=0.0, rent_flops=0.0), growth()),
    "lookahead": (policy(), growth(incubation="lookahead")),
    "nursery_4": (policy(nursery=4), growth()),
}
"""``grown`` with one thing changed."""
UNCHANGED = "unchanged"
LATER_ABLATIONS: dict[str, tuple[PolicySettings, Growth]] = {
    UNCHANGED: (policy(), growth()),
    "plateau": (policy(trigger="plateau"), growth()),
    "born_random": (policy(), growth()),
}
"""Registered when the first lines of version 2 were known, so they are outside the protocol's digest; each line says what was
changed. ``unchanged``: ``grown`` once more, on the processor that the others run on. ``born_random``: a seed's last layer is
drawn as torch draws it, where it is zero otherwise.
"""
TUNED_DEFAULTS = "job_defaults_3"
"""As a job grew that set nothing, once ``bench/defaults.py`` had chosen stays and patience."""
STRATEGIES: dict[str, tuple[PolicySettings, Growth]] = {
    "first_arm": (policy(strategy="first_arm"), growth()),
    "uniform": (policy(strategy="uniform"), growth()),
    "job_defaults": (PolicySettings(**POLICY_BEFORE), Growth(**GROWTH_BEFORE)),
    "job_defaults_2": (PolicySettings(**POLICY_BEFORE), Growth(**GROWTH_BEFORE)),
    TUNED_DEFAULTS: (PolicySettings(**{**POLICY_BEFORE, "patience": 2}), growth()),
}
"""``grown`` by a strategy that measures nothing: over what it gains, choosing pays. Registered when the ablations of seven RNG
seeds were known. ``job_defaults``, registered when all of these were: as a job grows that sets nothing;
``job_defaults_2``, registered when that was known: the same, once the policy asks for time with the seed in the network;
``job_defaults_3``, with what ``bench/defaults.py`` chose.
"""
BORN_RANDOM = "born_random"
FURTHER: dict[str, tuple[PolicySettings, Growth]] = {
    "periodic": (policy(trigger="periodic"), growth()),
    "generalisation_gap": (policy(trigger="generalisation_gap"), growth()),
    "gradient_bottleneck": (policy(trigger="gradient_bottleneck"), growth()),
}
"""``grown`` with one thing changed, registered when everything above was known, and compared with ``grown`` of H1, on its
processor.
"""
CONFIRMED: dict[str, tuple[float, ...]] = {"cifar10_16x16": (0.4, 0.8)}
"""Rates of the host continued that a job's defaults are compared with in the part ``confirm``, by data: on CIFAR the two that did
best of five (equally well on the gate split), on RNG seeds that nothing was tuned or read on. Elsewhere the defaults run on the
RNG seeds of H1, and are compared with its host continued.
"""
CONFIRM = "confirm"
CONFIRMED_DEFAULTS = "job_defaults_4"
"""As a job grew that set nothing, first with the stop rule; what it grew was trained from scratch, too (lines of commits before
``job_defaults_5``). Arms that were not gauged anew came in the order of the listing.
"""
DEFAULTS = "job_defaults_5"
"""As a job grows now that sets nothing: older merits go on to count where a job does not bear to gauge anew."""
NOW: dict[str, tuple[PolicySettings, Growth]] = {
    DEFAULTS: (PolicySettings(**{**POLICY_BEFORE, "patience": 2, "stop_rule": True}), growth()),
}
FIRST_RNG_SEED: dict[str, int] = {"cifar10_16x16": 20}
"""Of the part ``confirm``, by data, where it is not 0. Those from 10 on were ``job_defaults_4``'s, and read a second time for
``job_defaults_5``.
"""
BIRTHS = ("zero", "random")
"""How the last layer of a seed starts."""

LATER_RATES: dict[str, tuple[float, ...]] = {"cifar10_16x16": (0.2, 0.4, 0.8)}
"""More rates for the host continued, by data: the better of the two in the plan was the upper end of that grid, and so were 0.2
and 0.4. Registered when H1 was known, one after the other.
"""
GROWN_RATES: dict[str, tuple[float, ...]] = {"cifar10_16x16": (0.4, 0.2)}
"""More rates for ``grown``, by data, so that both sides are compared at the one that the gate split prefers. Registered when the
host continued was known at 0.4.
"""


def plan_of(data: lab.Data, *, quick: bool) -> dict[str, Any]:
    """Budgets for a data set, and its arms."""
    if data.vocabulary:
        short = {"h1": {"host_epochs": 1, "extra_host_epochs": 6}} if quick else {}
        return {**TEXT, **short, "arms": ()}
    plan = QUICK if quick else DIGITS if data.name == "digits" else FULL
    host = lab.fresh_host(data, 0)
    arms = choosing.arms_of(choosing.grower_of(data, host, 0, {**plan, **plan["h2"]}))
    return {**plan, "arms": tuple(choosing.name_of(arm) for arm in arms)}


def protocol(data: lab.Data, plan: dict[str, Any]) -> dict[str, object]:
    """Everything that decides what a line means."""
    return {
        "bench": "growth",
        "data": data.name,
        "plan": plan,
        "grown": [changed(policy()), changed(growth())],
        "picking": {name: changed(made) for name, made in PICKING.items()},
        "ablations": {name: [changed(part) for part in made] for name, made in ABLATIONS.items()},
        "strategy": STRATEGY,
        "version": VERSION,
    }


def changed(settings: msgspec.Struct) -> dict[str, object]:
    """Fields that differ from the defaults of then: neither a key that is added later nor another default changes a protocol."""
    then = POLICY_BEFORE if isinstance(settings, PolicySettings) else GROWTH_BEFORE
    defaults = type(settings)(**then)
    return {
        name: getattr(settings, name) for name in settings.__struct_fields__ if getattr(settings, name) != getattr(defaults, name)
    }
