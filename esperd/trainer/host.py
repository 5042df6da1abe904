"""A job's host: built from its reference, again and again the same, and checked before anything is trained."""

from __future__ import annotations

import hashlib
import inspect
import traceback
import weakref
from collections.abc import Callable

import torch
from torch import nn

from esperd.declarations import resolve
from esperd.errors import EsperError, ImportFailed, InvalidModel
from esperd.growth.export import HostReference
from esperd.growth.flops import count_flops, uncounted_modules
from esperd.growth.outputs import prediction
from esperd.growth.tracing import does_not_run
from esperd.growth.untouched import untouched
from esperd.messages.jobs import Job
from esperd.plugins import Plugins
from esperd.trainer.checkpoint import seed_rng


class HostFactory:
    """Builds a job's host, from the same RNG state each time.

    Args:
        job: names the host and its options.
        plugins: registered hosts by name.
        device: where hosts live.
    """

    def __init__(self, job: Job, plugins: Plugins, device: torch.device) -> None:
        self.job = job
        factory = job.host if ":" in job.host else plugins.hosts[job.host].factory
        self.reference = HostReference(factory=factory, options=job.host_options)
        self._device = device
        self._built: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._digest: str | None = None

    def build(self) -> nn.Module:
        """A fresh host, every RNG stream seeded with the job's ``rng_seed`` just before.

        Raises:
            ImportFailed: the factory does not import or raises.
            InvalidModel: it returns no module, one that is not initialised or needs several inputs, the same object again, or
                other weights than before.
        """
        factory = resolve(self.reference.factory)
        seed_rng(self.job.rng_seed)
        try:
            host = factory(**self.reference.options)
        except EsperError:
            raise
        except (Exception, SystemExit) as error:
            raise ImportFailed(
                f"host {self.job.host!r} raised {type(error).__name__}: {error}{self._what_it_takes(factory)}",
                reference=self.reference.factory,
                traceback=traceback.format_exc(),
            ) from error
        if not isinstance(host, nn.Module):
            raise InvalidModel(f"host {self.job.host!r} returned {type(host).__name__}, not a torch.nn.Module")
        self._require_initialised(host)
        self._require_one_input(host)
        if self.job.control:
            self._require_the_same_again(host)
        return host.to(self._device)

    def _what_it_takes(self, factory: Callable[..., object]) -> str:
        """The names that ``host_options`` may hold, where one of them is none; empty where all are, or any may be."""
        try:
            signature = inspect.signature(factory)
            signature.bind_partial(**self.reference.options)
        except ValueError:  # a builtin may hide its parameters
            return ""
        except TypeError:
            return f"; host_options may hold: {', '.join(signature.parameters)}"
        return ""

    def _require_initialised(self, host: nn.Module) -> None:
        for name, tensor in [*host.named_parameters(), *host.named_buffers()]:
            if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
                raise InvalidModel(
                    f"host {self.job.host!r} has the lazy parameter {name!r}, not initialised yet; run the model on one batch "
                    "before your function returns it",
                    parameter=name,
                )

    def _require_one_input(self, host: nn.Module) -> None:
        """A batch is one tensor: what else a model needs is named here, and not by a TypeError of its first pass."""
        try:
            parameters = inspect.signature(host.forward).parameters.values()
        except (TypeError, ValueError):  # forward is no Python function: its first pass tells
            return
        needed = [
            parameter.name
            for parameter in parameters
            if parameter.default is parameter.empty and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        if len(needed) > 1:
            raise InvalidModel(
                f"host {self.job.host!r} needs {len(needed)} inputs ({', '.join(needed)}), and a batch is one tensor; return a "
                "module that takes one and makes the others of it",
                inputs=needed,
            )

    def _require_the_same_again(self, host: nn.Module) -> None:
        """The control must start where the grown network started: another object, the same weights."""
        if host in self._built:
            raise InvalidModel(
                f"host {self.job.host!r} returned the very module it returned before, trained by now; with control = true it "
                "must build a new one on every call"
            )
        self._built.add(host)
        digest = hashlib.sha256()
        for name, tensor in host.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        if self._digest is not None and self._digest != digest.hexdigest():
            raise InvalidModel(
                f"host {self.job.host!r} came with other weights the second time, from the same seeds of torch, numpy and "
                "random; with control = true it must draw its weights from these streams only"
            )
        self._digest = digest.hexdigest()

    def output(self, host: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        """What the host predicts for a batch, without a trace.

        Raises:
            InvalidModel: when it does not run on it, or returns no prediction.
        """
        try:
            with untouched(host), torch.no_grad():
                output: object = host(inputs)
        except (Exception, SystemExit) as error:
            raise self.does_not_run(inputs, error) from error
        return prediction(output)

    def flops(self, host: nn.Module, inputs: torch.Tensor) -> float:
        """Forward FLOPs of one sample.

        Raises:
            InvalidModel: when FLOPs decide something (``control`` or ``budget.flops``) and those of a module are not counted.
        """
        with untouched(host), torch.no_grad():
            _, total = count_flops(lambda: host(inputs))
            unknown = uncounted_modules(host, inputs)
        if (unknown or total == 0) and (self.job.control or self.job.budget.flops is not None):
            named = f"the FLOPs of {', '.join(unknown)} are not counted" if unknown else "it has no counted FLOPs at all"
            raise InvalidModel(
                f"host {self.job.host!r}: {named}; set control = false and bound the budget by epochs or seconds",
                modules=unknown,
            )
        return total / len(inputs)

    def does_not_run(self, inputs: torch.Tensor, error: BaseException) -> InvalidModel:
        """The error of a host that does not take its own data."""
        return does_not_run(f"host {self.job.host!r}", inputs, error, of=" of the train split")
