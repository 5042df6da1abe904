"""What kind of module a host may be: one whose parts are called one by one, in Python."""

from __future__ import annotations

import torch
from torch import nn

from esperd.errors import InvalidModel


def require_plain(host: object) -> None:
    """Refuse what cannot be looked into. Slots are forward hooks: compiled and scripted code may pass them by, and a host under
    ``torch.compile`` has other parameter names than its own code, so that what is exported could not be loaded.

    Args:
        host: what was given as one.

    Raises:
        InvalidModel: it is no module, it is scripted, or it or a part of it is compiled; says what to do instead.
    """
    if not isinstance(host, nn.Module):
        raise InvalidModel(f"a host is a torch.nn.Module, not a {type(host).__name__}")
    if isinstance(host, torch.jit.ScriptModule):
        raise InvalidModel(
            f"the host is scripted or traced by torch.jit ({host.original_name}), and seeds cannot be placed in it; give the "
            "module it was made of, and use compile = true in a job, runner=Compiled() (esperd.growth.compiled) in a notebook"
        )
    for name, module in host.named_modules():
        # Torch's marks of torch.compile(module) and of module.compile(); asking torch itself would import its compiler.
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            part = f"its part {name!r} ({type(module).__name__})" if name else "the host"
            raise InvalidModel(
                f"{part} is under torch.compile already, and seeds cannot be placed in it; give the module as it is, and use "
                "compile = true in a job, runner=Compiled() (esperd.growth.compiled) in a notebook",
                module=name,
            )
