"""Runs kernels: the op-list interpreter."""

from __future__ import annotations

from esperd.execution.oplist import KernelModule, load_kernel

__all__ = ["KernelModule", "load_kernel"]
