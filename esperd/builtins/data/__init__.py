"""Loaders of the built-in data sets."""
