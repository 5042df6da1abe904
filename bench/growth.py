"""Does growing pay (H1), and does esperd choose well (H2)? A trained host improved on an extra budget; one of a dozen arms.

Protocol: ``bench/PROTOCOL.md``. Every arm of an RNG seed starts from the very same host. One JSON line an arm is appended to
``bench/results/growth.jsonl`` as it ends; an interrupted bench goes on where it stopped. ``--workers N`` runs arms side by side,
one thread each; ``--part`` runs one of the parts; ``--summary`` runs nothing and sums up what is known.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import choosing
import growth_figures
import growth_plan
import growth_plots
import harness
import improving
import incubation
import lab
import torch
from torch import nn

from esperd.growth import GrowingNetwork, measure

Needed = dict[str, dict[str, Any]]
"""Lines that a task starts from, by arm."""
FROM_GROWN = ("scratch_total", "scratch_marginal", "wide_parameters", "wide_flops")
"""A plan may name fewer."""
HOST = "host"
LAST = (*FROM_GROWN, "continued_0.05")
"""What is run when the primary contrast is known."""
GROMO = harness.REPOSITORY / "bench" / "results" / "gromo.json"
GROMO_FIGURES = ("gromo_digits/accuracy", "gromo_cifar/accuracy")
"""Of ``bench/gromo_peer.py``, told again beside the others."""
PARTS = ("h1", "h2", "ablations", "strategies", "further", "calibration", "birth", growth_plan.CONFIRM)
OF_H2 = ("h2", "calibration", "birth")
"""Parts with the host and the budgets of H2."""


@dataclass(frozen=True)
class Task:
    """One line of the bench.

    Args:
        part: which table it belongs to.
        rng_seed: of the run.
        arm: names the line within part and seed.
        needs: arms of the same part and seed whose lines it starts from.
    """

    part: str
    rng_seed: int
    arm: str
    needs: tuple[str, ...] = ()


def tasks(plan: dict[str, Any], rng_seed: int, parts: tuple[str, ...]) -> list[Task]:
    """Everything that one RNG seed runs, the longest chains first; some parts count RNG seeds from elsewhere."""
    arms: dict[str, list[tuple[str, ...]]] = {}  # each with what it starts from
    arms["h1"] = [
        ("grown",),
        *((arm, "grown") for arm in plan.get("from_grown", FROM_GROWN)),
        *((f"grown_{rate:g}",) for rate in plan.get("grown_rates", ())),
        *((f"continued_{rate:g}",) for rate in (*plan["continued_rates"], *plan.get("later_rates", ()))),
    ]
    arms["h2"] = [("scores",), *((f"arm:{arm}",) for arm in plan["arms"]), ("continued",)]
    for strategy in growth_plan.PICKING:
        arms["h2"].append((f"pick:{strategy}",))
        if strategy != "first_arm":  # choosing by lot costs nothing
            arms["h2"].append((f"continued:{strategy}", f"pick:{strategy}"))
    arms["ablations"] = [(name,) for name in (*growth_plan.LATER_ABLATIONS, *growth_plan.ABLATIONS)]
    arms["strategies"] = [(name,) for name in growth_plan.STRATEGIES]
    arms["calibration"] = [("behind",)]
    arms["birth"] = [(birth,) for birth in growth_plan.BIRTHS]
    arms["further"] = [(name,) for name in growth_plan.FURTHER]
    arms[growth_plan.CONFIRM] = [(growth_plan.DEFAULTS,)]
    arms[growth_plan.CONFIRM] += [(f"continued_{rate:g}",) for rate in plan.get("confirmed", ())]
    seeds = {part: rng_seed + first_rng_seed(part, plan) for part in parts}
    return [
        *(Task(part, seeds[part], HOST) for part in parts),
        *(Task(part, seeds[part], arm, (HOST, *needs)) for part in parts for arm, *needs in arms[part]),
    ]


def first_rng_seed(part: str, plan: dict[str, Any]) -> int:
    """From which a part counts."""
    return int(plan.get("first_confirmed", 0)) if part == growth_plan.CONFIRM else 0


# --- in a worker ---------------------------------------------------------------------------------------------------------


@functools.cache
def _data(path: str) -> lab.Data:
    torch.set_num_threads(1)
    return lab.load(Path(path) if path else None)


def _host(data: lab.Data, rng_seed: int, plan: dict[str, Any], cache: str) -> nn.Module:
    """The trained host of an RNG seed, trained once."""
    name = f"{data.name}-{rng_seed}-{plan['host_epochs']}-{plan['pretrain_rate']}.pt"
    kept, host = Path(cache) / name, lab.fresh_host(data, rng_seed)
    if not kept.exists():
        trained = incubation.host_of(data, rng_seed, plan)
        written = kept.with_suffix(f".{os.getpid()}")
        torch.save(trained.state_dict(), written)
        written.rename(kept)
    host.load_state_dict(torch.load(kept, weights_only=True))
    return host


def run(task: Task, plan: dict[str, Any], needed: Needed, path: str, cache: str) -> dict[str, Any]:
    """Do one task."""
    data = _data(path)
    plan = {**plan, **(plan["h2"] if task.part in OF_H2 else plan["h1"])}
    host = lab.fresh_host(data, task.rng_seed) if task.arm in FROM_GROWN else _host(data, task.rng_seed, plan, cache)
    began = time.perf_counter()
    line = _line_of_host(host, data) if task.arm == HOST else _WORK[task.part](task, data, host, plan, needed)
    return {**line, "wall_seconds": round(time.perf_counter() - began, 2), "processor": harness.machine()["cpu"]}


def _improve(task: Task, data: lab.Data, host: nn.Module, plan: dict[str, Any], needed: Needed) -> dict[str, Any]:
    extra, total = plan["extra_host_epochs"], plan["extra_host_epochs"] + plan["host_epochs"]
    seed = task.rng_seed
    if task.arm == "grown":
        return improving.grow(data, host, seed, plan, growth_plan.policy(), growth_plan.growth())
    if task.arm.startswith("grown_"):
        plan = {**plan, "rate": float(task.arm.removeprefix("grown_"))}
        return improving.grow(data, host, seed, plan, growth_plan.policy(), growth_plan.growth())
    if task.arm.startswith("continued_"):
        rate = float(task.arm.removeprefix("continued_"))
        return improving.train_alone(data, host, seed, plan, host_epochs=extra, rate=rate)
    grown = needed["grown"]
    if task.arm.startswith("scratch_"):
        budget = total if task.arm == "scratch_total" else extra
        return improving.train_final(data, grown["kept"], seed, plan, host_epochs=budget)
    matched = (
        {"parameters": grown["parameters"]} if task.arm == "wide_parameters" else {"flops_per_sample": grown["flops_per_sample"]}
    )
    wide = improving.widened(data, seed, **matched)
    return improving.train_alone(data, wide, seed, plan, host_epochs=extra, rate=plan["pretrain_rate"])


def _choose(task: Task, data: lab.Data, host: nn.Module, plan: dict[str, Any], needed: Needed) -> dict[str, Any]:
    kind, _, name = task.arm.partition(":")
    seed, budget = task.rng_seed, plan["arm_epochs"]
    if kind == "scores":
        return choosing.score_arms(data, host, seed, plan)
    if kind == "pick":
        return choosing.pick(data, host, growth_plan.PICKING[name], seed, plan)
    if kind == "arm":
        return choosing.train_arm(data, host, name, seed, plan, host_epochs=budget)
    spent = needed[f"pick:{name}"]["cost"] if name else 0.0
    return choosing.train_arm(data, host, "continued", seed, plan, host_epochs=budget + spent)


def _ablate(task: Task, data: lab.Data, host: nn.Module, plan: dict[str, Any], needed: Needed) -> dict[str, Any]:
    if task.arm not in _CHANGES[task.part]:  # what the defaults are compared with
        return _improve(task, data, host, plan, needed)
    policy, growth = _CHANGES[task.part][task.arm]
    born_random = task.arm == growth_plan.BORN_RANDOM
    line = improving.grow(data, host, task.rng_seed, plan, policy, growth, born_random=born_random)
    return {**line, "settings": [growth_plan.changed(part) for part in (policy, growth)]}


def _line_of_host(host: nn.Module, data: lab.Data) -> dict[str, Any]:
    return {"gate_accuracy": measure(GrowingNetwork(host, ()), lab.in_order(data.gate), lab.loss, lab.accuracy).mean_metric}


def _calibrate(task: Task, data: lab.Data, host: nn.Module, plan: dict[str, Any], _needed: Needed) -> dict[str, Any]:
    return choosing.score_behind_host(data, host, task.rng_seed, plan)


def _bear(task: Task, data: lab.Data, host: nn.Module, plan: dict[str, Any], _needed: Needed) -> dict[str, Any]:
    return choosing.train_born(data, host, task.arm, task.rng_seed, plan)


_CHANGES = {
    "ablations": {**growth_plan.ABLATIONS, **growth_plan.LATER_ABLATIONS},
    "strategies": growth_plan.STRATEGIES,
    "further": growth_plan.FURTHER,
    growth_plan.CONFIRM: growth_plan.NOW,
}
_WORK: dict[str, Callable[..., dict[str, Any]]] = {
    "h1": _improve,
    "h2": _choose,
    "calibration": _calibrate,
    "birth": _bear,
    **dict.fromkeys(_CHANGES, _ablate),
}


# --- in the bench --------------------------------------------------------------------------------------------------------


def run_all(wanted: list[Task], lines: lab.Lines, plan: dict[str, Any], path: Path | None, *, workers: int, until: float) -> None:
    """Run what is missing, each task as soon as what it starts from is known; nothing is begun after ``until``."""
    waiting = [task for task in wanted if not known(lines, task, plan)]
    running: dict[Future[dict[str, Any]], Task] = {}
    cache = str(Path(tempfile.gettempdir()) / "esperd-bench-hosts")
    Path(cache).mkdir(exist_ok=True)
    total = len(waiting)
    with ProcessPoolExecutor(workers) as pool:
        while waiting or running:
            for task in list(waiting):
                ready = all(known(lines, Task(task.part, task.rng_seed, need), plan) for need in task.needs)
                if ready and len(running) < workers and time.time() < until:
                    waiting.remove(task)
                    needed = {need: known(lines, Task(task.part, task.rng_seed, need), plan)[0] for need in task.needs}
                    running[pool.submit(run, task, plan, needed, str(path or ""), cache)] = task
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(done)
                error = done.exception()
                if error is not None:
                    print(f"{task} failed", file=sys.stderr)
                    traceback.print_exception(error)
                    lines.add(_told(task, {"failed": f"{type(error).__name__}: {error}", "processor": harness.machine()["cpu"]}))
                    waiting = [
                        other
                        for other in waiting
                        if (other.part, other.rng_seed) != (task.part, task.rng_seed) or task.arm not in other.needs
                    ]
                    continue
                lines.add(_told(task, done.result()))
                print(f"{total - len(waiting) - len(running)} of {total} runs", file=sys.stderr)


def _told(task: Task, found: dict[str, Any]) -> dict[str, Any]:
    return {"part": task.part, "rng_seed": task.rng_seed, "arm": task.arm, **found}


def known(lines: lab.Lines, task: Task, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of a task. What starts from the trained host counts only when all of it was run on one kind of processor, or on this
    one: sums round otherwise on another, and the host would not be the same.
    """
    found = lines.of(part=task.part, rng_seed=task.rng_seed, arm=task.arm)
    if task.arm in FROM_GROWN or not found:
        return found
    counted = task.rng_seed - first_rng_seed(task.part, plan)
    together = [other.arm for other in tasks(plan, counted, (task.part,)) if other.arm not in FROM_GROWN]
    held = [{line["processor"] for line in lines.of(part=task.part, rng_seed=task.rng_seed, arm=arm)} for arm in together]
    enough = set.intersection(*held) or {harness.machine()["cpu"]}
    return [line for line in found if line["processor"] in enough]


def main() -> None:
    """Run what is missing, print, write."""
    torch.set_num_threads(1)
    parser = harness.parser(__doc__.partition("\n")[0], repeats=10, quick_repeats=2)
    parser.add_argument("--workers", type=int, default=1, help="arms that run side by side (default 1)")
    parser.add_argument("--part", choices=PARTS, action="append", help="run only this part; may be repeated")
    parser.add_argument("--summary", action="store_true", help="run nothing: sum up the lines that are known")
    parser.add_argument("--plots", type=Path, help="write a picture of what is known there, for example growth.svg")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so many seconds")
    chosen = harness.parsed(parser)
    if chosen.plots is not None and not chosen.plots.parent.is_dir():
        parser.error(f"{chosen.plots} cannot be written: there is no folder {chosen.plots.parent}")
    data = lab.load(chosen.data)
    plan = growth_plan.plan_of(data, quick=chosen.quick)
    lines = lab.Lines(
        harness.REPOSITORY / "bench" / "results" / "growth.jsonl", growth_plan.protocol(data, plan), keep=not chosen.quick
    )
    plan["grown_rates"] = growth_plan.GROWN_RATES.get(data.name, ())
    plan["later_rates"] = growth_plan.LATER_RATES.get(data.name, ())
    plan["confirmed"] = growth_plan.CONFIRMED.get(data.name, ())
    plan["first_confirmed"] = growth_plan.FIRST_RNG_SEED.get(data.name, 0)
    offered = (*plan["parts"], growth_plan.CONFIRM) if "parts" in plan else PARTS
    short = [part for part in offered[:2] if part != growth_plan.CONFIRM]
    parts = tuple(chosen.part or (short if chosen.quick else offered))
    if not set(parts) <= set(offered):
        parser.error(f"for {data.name} the protocol has only the parts {', '.join(offered)}")
    wanted = [task for rng_seed in range(chosen.repeats) for task in tasks(plan, rng_seed, parts)]
    if not chosen.summary:
        wanted.sort(key=lambda task: (parts.index(task.part), task.arm != HOST, task.arm in LAST, task.rng_seed))
        run_all(wanted, lines, plan, chosen.data, workers=chosen.workers, until=time.time() + chosen.seconds)
    figures = growth_figures.figures(lines)
    if data.name == "cifar10_16x16" and not chosen.quick:  # the summary of everything that growing was compared with
        figures += [figure for figure in harness.read(GROMO).figures if figure.name in GROMO_FIGURES]
    print(growth_figures.tables(lines))
    if chosen.plots is not None:
        growth_plots.draw(lines, chosen.plots)
    if chosen.json is not None:
        settings = {"data": data.name, "rng_seeds": chosen.repeats, "protocol": lines.digest}
        harness.write(harness.results("growth", figures, quick=chosen.quick, settings=settings), chosen.json)


if __name__ == "__main__":
    main()
