"""Chance as a function: a lot depends on the RNG seed, the point and the arm, never on where the arm stands in a list."""

from __future__ import annotations

import hashlib
import math
from statistics import NormalDist

from esperd.messages.policy import Arm, Decide

_BITS = 52
"""So many that (2**52 - 1/2) / 2**52 is still a double below 1."""


def listing(rng_seed: int, arm: Arm) -> bytes:
    """Place of an arm in the job's listing: the order is drawn once, by the RNG seed."""
    return hashlib.blake2b(f"{rng_seed}\0{arm.slot}\0{arm.blueprint}".encode(), digest_size=8).digest()


def uniform(request: Decide, arm: Arm | None = None) -> float:
    """A number between 0 and 1, both excluded; a new one at every point.

    Args:
        request: names RNG seed and point.
        arm: whose lot it is; None: one for the whole point.
    """
    whose = "" if arm is None else f"\0{arm.slot}\0{arm.blueprint}"
    digest = hashlib.blake2b(
        f"{request.rng_seed}\0{request.point}{whose}".encode(), digest_size=8, person=b"esperd-point"
    ).digest()
    return float((int.from_bytes(digest, "big") >> (64 - _BITS)) + 0.5) / float(2**_BITS)


def normal(request: Decide, arm: Arm) -> float:
    """Standard normal."""
    return NormalDist().inv_cdf(uniform(request, arm))


def gumbel(request: Decide, arm: Arm) -> float:
    """Standard Gumbel. The arm with the largest ``logit + gumbel`` is drawn with the probability that a softmax of the logits
    gives it; the first k are drawn without putting back (Gumbel 1954; Kool, van Hoof and Welling 2019, arXiv:1903.06059).
    """
    return -math.log(-math.log(uniform(request, arm)))
