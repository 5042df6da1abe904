"""Torch code of the built-in hosts."""
