"""One forward pass of the host, shared: what it computed before a slot is kept, and passes from that slot on run again.

A seed that learns behind the host needs the rest of the network behind its slot, again and again, and nothing of what stands
before it. While the host makes its own pass, a :class:`Recording` keeps what the largest calls that end before the slot returned;
:meth:`Recording.from_slot` then lets those calls return what they returned, so that a further pass through the host's own
``forward`` executes only what comes after. Buffers, dropout masks (drawn from where the stream stood at the slot) and residual
paths around the slot are those of the host's pass.

It is right only for hosts whose calls come in one order and talk to each other through what they return. Whoever uses it compares
it with a whole pass first; see :class:`esperd.growth.incubation.Incubator`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from esperd.growth.network import GrowingNetwork
from esperd.growth.streams import Streams, device_of
from esperd.growth.untouched import untouched

Call = tuple[nn.Module, int]
"""The n-th call of a module in one pass, counted from 0."""


class OrderChanged(Exception):
    """The host's calls came in another order than when it was traced: this pass cannot be shared."""


@dataclass
class _Node:
    """One call while it is traced."""

    call: Call
    children: list[_Node] = field(default_factory=list)


def calls_before(network: GrowingNetwork, inputs: torch.Tensor, slots: Sequence[str]) -> tuple[dict[str, tuple[Call, ...]], bool]:
    """For each slot, the largest calls of the host that end before the slot's module does, in order, that module's own last; and
    whether the pass drew from Python's or numpy's RNG stream.

    Args:
        network: runs once, without a trace.
        inputs: (B, ...).
        slots: names.
    """
    wanted = {network.host.get_submodule(slot): slot for slot in slots}
    root = _Node((network.host, 0))
    stack, counts, found = [root], {network.host: 1}, dict[str, tuple[Call, ...]]()

    def enter(module: nn.Module, _inputs: object) -> None:
        node = _Node((module, counts.get(module, 0)))
        counts[module] = node.call[1] + 1
        stack[-1].children.append(node)
        stack.append(node)

    def leave(module: nn.Module, _inputs: object, _output: object) -> None:
        stack.pop()
        if module in wanted:
            running = [id(node) for node in stack]
            ended = (child for node in stack for child in node.children if id(child) not in running)
            found[wanted[module]] = tuple(child.call for child in ended)

    modules = [module for module in network.host.modules() if module is not network.host]
    handles = [module.register_forward_pre_hook(enter) for module in modules]
    handles += [module.register_forward_hook(leave) for module in modules]
    try:
        with untouched(network), torch.no_grad():
            before = Streams.take(device_of(network))
            network(inputs)
            draws = before.everybodys_moved()
    finally:
        for handle in handles:
            handle.remove()
    return found, draws


@dataclass(frozen=True)
class _Kept:
    """What a call returned, cut from the graph, and a copy of it as it was then."""

    returned: Any
    copy: Any

    def handed(self, *, copied: bool) -> Any:  # noqa: ANN401 - whatever a module returns
        return pytree.tree_map_only(torch.Tensor, torch.clone, self.copy) if copied else self.returned


class Recording:
    """What one pass of the host returned, call by call, as far as some slots need it.

    Args:
        network: the pass goes through it inside :meth:`running`.
        plan: from :func:`calls_before`.
        copies: keep copies as well: for hosts that write into tensors in place.
        everybodys: keep where Python's and numpy's RNG streams stood, too.
    """

    def __init__(
        self, network: GrowingNetwork, plan: Mapping[str, Sequence[Call]], *, copies: bool, everybodys: bool = True
    ) -> None:
        self._network = network
        self._plan = plan
        self._copies = copies
        self._everybodys = everybodys
        self._kept: dict[Call, _Kept] = {}
        self._at_slot: dict[str, _Kept] = {}
        self._streams: dict[str, Streams] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keep what is returned inside.

        Raises:
            OrderChanged: at the end, when a call that was kept when the host was traced did not happen.
        """
        wanted = {call for calls in self._plan.values() for call in calls}
        counts: dict[nn.Module, int] = {}

        def keep(module: nn.Module, _inputs: object, output: object) -> None:
            call = (module, counts.get(module, 0))
            counts[module] = call[1] + 1
            if call in wanted:
                self._kept[call] = self._keep(output)

        ports = {slot: self._network.port(slot) for slot in self._plan}
        for slot, port in ports.items():
            port.tap = self._tap(slot)
        handles = [module.register_forward_hook(keep) for module in dict.fromkeys(module for module, _ in wanted)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for port in ports.values():
                port.tap = None
        if self._kept.keys() != wanted or self._at_slot.keys() != self._plan.keys():
            raise OrderChanged

    def _tap(self, slot: str) -> Callable[[torch.Tensor], None]:
        device = device_of(self._network)

        def tap(tensor: torch.Tensor) -> None:
            self._at_slot[slot] = self._keep(tensor)
            self._streams[slot] = Streams.take(device, everybodys=self._everybodys)

        return tap

    def _keep(self, output: Any) -> _Kept:  # noqa: ANN401 - whatever a module returns
        cut = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, output)
        return _Kept(cut, pytree.tree_map_only(torch.Tensor, torch.clone, cut) if self._copies else None)

    def streams(self, slot: str) -> Streams:
        """Where the RNG streams stood when the pass reached the slot."""
        return self._streams[slot]

    @contextmanager
    def from_slot(self, slot: str, *, copied: bool) -> Iterator[None]:
        """Let passes inside start at the slot: everything before it returns what it returned, the slot's tensor is cut.

        Args:
            slot: one of the plan's.
            copied: hand out copies of the copies, so that whatever is written into them is written into nothing else.

        Raises:
            OrderChanged: at the end, when not every kept call was asked for.
        """
        calls = self._plan[slot]
        at_slot = calls[-1][0]
        kept: dict[nn.Module, list[_Kept]] = {module: [] for module, _ in calls}
        # Calls inside a kept call are not made again, so the n-th call that is made of a module is its n-th kept one.
        for module, number in calls[:-1]:
            kept[module].append(self._kept[module, number])
        port = self._network.port(slot)
        asked: list[nn.Module] = []

        def standing_in(module: nn.Module) -> Callable[..., Any]:
            own, returned = module._compiled_call_impl, iter(kept[module])

            def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever the module takes and returns
                asked.append(module)
                if module is at_slot:
                    return port(self._at_slot[slot].handed(copied=copied))
                for output in returned:
                    return output.handed(copied=copied)
                asked.pop()
                return own(*args, **kwargs) if own is not None else module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

            return call

        # what nn.Module calls instead of its hooks and its forward when it is there (torch.nn.Module.compile sets it)
        standing = {module: module._compiled_call_impl for module in kept}
        for module in kept:
            module._compiled_call_impl = standing_in(module)
        try:
            yield
        finally:
            for module, own in standing.items():
                module._compiled_call_impl = own
        if len(asked) != len(calls):
            raise OrderChanged
