"""How much may be grown: seconds are charged where they are known, and memory is left free where that is asked for."""

from __future__ import annotations

import msgspec
import pytest
from policy_requests import observation, option, request, seed

from esperd.messages.growth import Stage
from esperd.messages.policy import Headroom, PolicySettings
from esperd.policy.credit import observe
from esperd.policy.rent import rent
from esperd.policy.state import BanditState
from esperd.policy.ucb import decide

FREE = PolicySettings(rent_parameters=0.0, rent_flops=0.0, rent_seconds=0.1)


def decided(policy, **seen):
    (decision,) = decide(request(observation(**seen), policy=policy)).decisions
    return decision


def timed(share):
    return (option_with(seconds_share=share),)


def option_with(**fields):
    return msgspec.structs.replace(option(), **fields)


def test_seconds_are_charged_once_they_are_known():
    assert rent(100, 1000.0, observation(), FREE, None) == 0.0
    assert rent(100, 1000.0, observation(), FREE, 0.5) == pytest.approx(0.05)
    assert rent(100, 1000.0, observation(), PolicySettings(), 0.5) == rent(100, 1000.0, observation(), PolicySettings())
    assert "rent 0.0500" in decided(FREE, options=timed(0.5)).reason


def test_a_seed_pays_for_the_seconds_that_were_measured_when_it_germinated():
    told = observation(options=timed(0.5), seeds=(seed("s1#1", stage=Stage.TRAINING),))
    (pending,) = observe(BanditState(), told, FREE).pending
    assert pending.rent == pytest.approx(0.05)
    (unknown,) = observe(BanditState(), observation(seeds=(seed("s1#1", stage=Stage.TRAINING),)), FREE).pending
    assert unknown.rent == 0.0


def short(free, total=1000 * 2**20):
    return Headroom(where="cgroup", free_bytes=free * 2**20, total_bytes=total)


def test_nothing_is_grown_where_memory_is_short():
    policy = PolicySettings(min_free_memory=0.1)
    assert decided(policy, headroom=short(100)).action == "germinate"
    assert decided(policy, headroom=short(99)).reason == (
        "memory is short: 99 of 1000 MiB are free (cgroup), 9.9%, and 10.0% must be (min_free_memory)"
    )
    assert decided(PolicySettings(), headroom=short(0)).action == "germinate", "it is not looked at unless asked for"


def test_memory_that_cannot_be_measured_is_not_taken_for_free():
    refused = decided(PolicySettings(min_free_memory=0.1), headroom=None)
    assert refused.reason == "free memory cannot be measured here, and 10% of it must be free (min_free_memory)"
