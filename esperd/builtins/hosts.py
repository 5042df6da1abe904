"""Networks a job can name. Declarations only: the code is in :mod:`esperd.builtins.networks`, imported by workers."""

from __future__ import annotations

from collections.abc import Iterable

from esperd.declarations import Host
from esperd.hookspecs import hookimpl


@hookimpl
def esperd_hosts() -> Iterable[Host]:
    """The small networks that examples, demo and benches train."""
    return (
        Host(
            name="cnn",
            factory="esperd.builtins.networks.cnn:cnn",
            description="stages of conv 3x3, batch norm, ReLU, max pooling between; options: channels, in_channels, classes",
        ),
        Host(
            name="mlp",
            factory="esperd.builtins.networks.mlp:mlp",
            description="linear layers with ReLU on the flattened input; options: in_features, hidden, classes",
        ),
        Host(
            name="transformer",
            factory="esperd.builtins.networks.transformer:transformer",
            description="causal language model, pre-norm; options: vocabulary, context, width, depth, heads, dropout",
        ),
    )
