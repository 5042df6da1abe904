"""Growing itself, as a plain torch library: usable from a notebook, without a daemon.

A network is grown by a :class:`Grower`: give :func:`assemble` a :class:`GrowingNetwork` (your host and its slots, see
:func:`find_slots`) and a source of seeds (:class:`BlueprintSource`), call :meth:`Grower.train_step` for each batch, and once
per epoch :meth:`Grower.measure`, :meth:`Grower.end_epoch` and :meth:`Grower.apply`. ``docs/growth.md`` shows it whole.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esperd.growth.assembly import assemble
    from esperd.growth.attribution import attribute
    from esperd.growth.contract import check_blueprint
    from esperd.growth.contribution import measure
    from esperd.growth.distributed import Distributed
    from esperd.growth.export import load
    from esperd.growth.grower import Grower
    from esperd.growth.network import GrowingNetwork, Seed
    from esperd.growth.onnx import export_onnx
    from esperd.growth.optimizer import set_learning_rate
    from esperd.growth.plain import plain_module
    from esperd.growth.portable import export_program
    from esperd.growth.ranks import Joined
    from esperd.growth.slots import find_slots
    from esperd.growth.source import BlueprintSource
    from esperd.growth.trial import controlled_trial

_PUBLIC = {
    "BlueprintSource": "source",
    "Distributed": "distributed",
    "Grower": "grower",
    "GrowingNetwork": "network",
    "Joined": "ranks",
    "Seed": "network",
    "assemble": "assembly",
    "attribute": "attribution",
    "check_blueprint": "contract",
    "controlled_trial": "trial",
    "export_onnx": "onnx",
    "export_program": "portable",
    "find_slots": "slots",
    "load": "export",
    "measure": "contribution",
    "plain_module": "plain",
    "set_learning_rate": "optimizer",
}

__all__ = [
    "BlueprintSource",
    "Distributed",
    "Grower",
    "GrowingNetwork",
    "Joined",
    "Seed",
    "assemble",
    "attribute",
    "check_blueprint",
    "controlled_trial",
    "export_onnx",
    "export_program",
    "find_slots",
    "load",
    "measure",
    "plain_module",
    "set_learning_rate",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever is asked for
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
