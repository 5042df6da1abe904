"""Data sets a job can name. Declarations only: the loaders are in :mod:`esperd.builtins.data`, imported by workers."""

from __future__ import annotations

from collections.abc import Iterable

from esperd.declarations import Dataset
from esperd.hookspecs import hookimpl


@hookimpl
def esperd_datasets() -> Iterable[Dataset]:
    """The data set that needs no file, and the classic formats of files by path. None of them runs code of a file."""
    return (
        Dataset(
            name="digits",
            loader="esperd.builtins.data.digits:digits",
            description="1,797 handwritten digits of 8x8 pixels, from scikit-learn (pip install 'esperd[digits]')",
        ),
        Dataset(
            name="text",
            loader="esperd.builtins.data.text:text",
            description="a text file, characters as tokens, for next_token; options: path, context, stride, vocabulary",
        ),
        Dataset(
            name="idx",
            loader="esperd.builtins.data.idx:idx",
            description="idx files as of MNIST, .gz or not; options: images, labels, test_images, test_labels",
        ),
        Dataset(
            name="cifar",
            loader="esperd.builtins.data.cifar:cifar",
            description="the folder of CIFAR-10's or CIFAR-100's binary version; options: path, labels (fine, coarse)",
        ),
    )
