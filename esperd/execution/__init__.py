"""Runs kernels: the op-list interpreter."""

from __future__ import annotations

from esperd.execution.kernel import KernelModule, load_kernel

__all__ = ["KernelModule", "load_kernel"]
