"""Checksums of weights and buffers, computed where they live: whether two processes hold the same network, to the bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

from esperd.growth.network import GrowingNetwork

CHUNK = 2**20
"""Numbers that are weighed at once: 24 MB of scratch. Chosen, not measured."""

FIRST_FACTOR, SECOND_FACTOR = -0x61C8864680B583EB, -0x6B2FB644ECCEEE15
"""Odd, so that multiplying loses no bit: two constants of SplitMix64 (Steele, Lea & Flood 2014), as signed numbers."""

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the size of a number in bytes."""


def checksums(network: GrowingNetwork) -> dict[str, str]:
    """Checksums of the host's and of each seed's weights and buffers, by name. Unequal ones prove that a bit differs."""
    modules = {"host": network.host, **{seed.name: seed for seed in network.seeds()}}
    parts = {}
    for name, module in modules.items():
        parts[f"weights of {name}"] = checksum(module.named_parameters())
        parts[f"buffers of {name}"] = checksum(module.named_buffers())
    return parts


def checksum(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """64 bits over names, shapes, dtypes and every bit of some tensors, as hexadecimal digits."""
    weighed = [(name, tuple(tensor.shape), str(tensor.dtype), weigh(tensor)) for name, tensor in tensors]
    told = repr([(name, shape, dtype, int(weight)) for name, shape, dtype, weight in weighed])  # waits for the device here
    return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()


def weigh(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of all numbers' bits, read as integers, each times an odd weight that depends on its place; modulo 2^64.

    Whole numbers only, so the order of summation does not matter. One number that differs always changes the sum; of several,
    that they cancel is as likely as any 64 bits.

    Returns:
        () int64, on the tensor's device.
    """
    flat = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    bits = flat.contiguous().reshape(-1).view(INTEGERS[tensor.element_size() // (2 if tensor.is_complex() else 1)])
    places = _places(min(CHUNK, max(bits.numel(), 1)), tensor.device)
    weight = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in torch.split(bits, CHUNK):
        weight = weight * FIRST_FACTOR + (part.long() * places[: part.numel()]).sum()
    return weight


def _places(count: int, device: torch.device) -> torch.Tensor:
    """Odd numbers (count,) without a pattern, one for each place: mixed by multiplying and folding, as hashes do."""
    mixed = torch.arange(1, count + 1, dtype=torch.int64, device=device) * FIRST_FACTOR
    mixed = (mixed ^ (mixed >> 31)) * SECOND_FACTOR
    return (mixed ^ (mixed >> 29)) | 1
