"""Data sets a job can name. Declarations only: the loaders are in :mod:`esperd.builtins.data`, imported by workers."""

from __future__ import annotations

from collections.abc import Iterable

from esperd.declarations import Dataset
from esperd.hookspecs import hookimpl


@hookimpl
def esperd_datasets() -> Iterable[Dataset]:
    """The data set that needs no file. Files are given by path, see :mod:`esperd.trainer.data`."""
    return (
        Dataset(
            name="digits",
            loader="esperd.builtins.data.digits:digits",
            description="1,797 handwritten digits of 8x8 pixels, from scikit-learn (pip install 'esperd[digits]')",
        ),
    )
