"""Runs kernels: the op-list interpreter."""
