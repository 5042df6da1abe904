"""Would a learned strategy choose better? A graph network on recorded choices of ``bench/growth.py``, judged on RNG seeds it never saw.

Protocol: ``bench/PROTOCOL.md``. It runs no arm: it reads ``bench/results/growth.jsonl``, trains, and says whether such a strategy ships.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import choosing
import growth_figures
import growth_plan
import harness
import lab
import torch
from learned_graph import GraphNetwork, Graphs, Record, graphs, learn, records

PEERS = ("gradient_merit", "best_fixed")
"""Whom it has to beat."""


def picks(known: Graphs, arms: list[str], found: list[Record]) -> dict[str, list[int | None]]:
    """Place of the arm that each strategy picks, by RNG seed; None: it grows nothing."""
    told: dict[str, list[int | None]] = {"learned": []}
    every = range(len(found))
    for seed in every:
        others = [other for other in every if other != seed]
        told["learned"].append(int(learn(known, others, list(range(len(arms))))(seed).argmax()))
        told.setdefault("best_fixed", []).append(int(known.gains[others].mean(0).argmax()))
        for name in growth_plan.PICKING:
            picked = found[seed].of[f"pick:{name}"]["picked"]
            told.setdefault(name, []).append(arms.index(picked) if picked else None)
        for name, values in found[seed].of["scores"]["scores"].items():
            if name != "merit":
                ranked = [-math.inf if values[arm] is None else values[arm] for arm in arms]
                told.setdefault(name, []).append(ranked.index(max(ranked)))
    return told


def reached(found: list[Record], picked: list[int | None], figure: str) -> list[float]:
    """What the picked arms ended with; the host continued where nothing was picked."""
    base = {"losses": "gate_loss", "audits": "audit_accuracy"}[figure]
    pairs = zip(found, picked, strict=True)
    return [record.of["continued"][base] if arm is None else getattr(record, figure)[arm] for record, arm in pairs]


def unseen_blueprint(known: Graphs, arms: list[str]) -> tuple[float, float]:
    """Mean rank correlation with the gains of an RNG seed that was left out: as trained, and with one blueprint left out as well,
    over the arms' order when each blueprint's scores come from networks that never saw it.
    """
    every, seen, unseen = range(len(known.gains)), [], []
    for seed in every:
        others = [other for other in every if other != seed]
        gains = known.gains[seed].tolist()
        seen.append(growth_figures.rank_correlation(learn(known, others, list(range(len(arms))))(seed).tolist(), gains))
        scores = torch.zeros(len(arms))
        for blueprint in choosing.BLUEPRINTS:
            mine = [place for place, arm in enumerate(arms) if arm.startswith(f"{blueprint} ")]
            rest = [place for place in range(len(arms)) if place not in mine]
            scores[mine] = learn(known, others, rest)(seed)[mine]
        unseen.append(growth_figures.rank_correlation(scores.tolist(), gains))
    return statistics.fmean(seen), statistics.fmean(unseen)


def report(data: lab.Data, arms: Sequence[str], found: list[Record]) -> str:
    """Everything there is to read, and the verdict."""
    known = graphs(data, list(arms), found)
    told = picks(known, list(arms), found)
    losses = {name: reached(found, picked, "losses") for name, picked in told.items()}
    audits = {name: reached(found, picked, "audits") for name, picked in told.items()}
    losses["uniform"], audits["uniform"] = ([statistics.fmean(of) for of in each] for each in _figures(found))
    best = [record.audits[record.losses.index(min(record.losses))] for record in found]
    size = sum(weight.numel() for weight in GraphNetwork(known.nodes.shape[-1]).parameters())
    rows = [
        f"A learned strategy: {size} parameters, {len(found)} RNG seeds of {len(arms)} arms, each chosen for by networks that saw the others",
        "  regret: gate loss over the lowest one; points of audit accuracy below the arm that has it; learned minus the other [95 % BCa]",
    ]
    intervals = {}
    for name in sorted(losses, key=lambda name: statistics.fmean(losses[name])):
        regret = statistics.fmean(loss - min(record.losses) for loss, record in zip(losses[name], found, strict=True))
        behind = statistics.fmean(100 * (top - mine) for top, mine in zip(best, audits[name], strict=True))
        pairs = zip(audits["learned"], audits[name], strict=True)
        mean, low, high = intervals[name] = growth_figures.interval([100 * (mine - other) for mine, other in pairs])
        against = "" if name == "learned" else f"  {mean:+.2f} [{low:+.2f}, {high:+.2f}]"
        rows.append(f"  {name:20} {regret:.4f}  {behind:+.2f}{against}")
    seen, unseen = unseen_blueprint(known, list(arms))
    rows.append(
        f"  rank correlation with the gains of an RNG seed left out: {seen:+.2f}; of blueprints left out as well: {unseen:+.2f}"
    )
    rows.append("  Records are of one host: what another host needs cannot be in them.")
    wins = all(intervals[name][1] > 0 for name in PEERS)
    rows.append(f"Verdict: it {'ships' if wins else 'does not ship'}: {_because(intervals)}")
    return "\n".join(rows)


def _figures(found: list[Record]) -> tuple[list[list[float]], list[list[float]]]:
    return [record.losses for record in found], [record.audits for record in found]


def _because(intervals: dict[str, tuple[float, float, float]]) -> str:
    told = []
    for name in PEERS:
        low = intervals[name][1]
        unknown = "an interval of fewer than eight RNG seeds is not known" if math.isinf(low) else f"lower end {low:+.2f} points"
        told.append(f"over {name} {unknown}")
    return ", ".join(told)


def main() -> None:
    """Train, compare, say whether it ships."""
    torch.set_num_threads(1)
    chosen = harness.arguments(__doc__.partition("\n")[0], repeats=10, quick_repeats=10)
    data = lab.load(chosen.data)
    plan = growth_plan.plan_of(data, quick=False)
    lines = lab.Lines(harness.REPOSITORY / "bench" / "results" / "growth.jsonl", growth_plan.protocol(data, plan), keep=True)
    found = records(lines)
    if len(found) < 2:
        print("fewer than two RNG seeds of H2 are complete: there is nothing to learn from")
        return
    print(report(data, plan["arms"], list(found.values())))


if __name__ == "__main__":
    main()
