"""Would a learned strategy choose better? A graph network on recorded choices, and cheap scores weighted by what they proved
worth, both judged on RNG seeds that they never saw.

Protocol: ``bench/PROTOCOL.md``. It runs no arm: it reads the lines of H2 in ``bench/results/growth.jsonl``, trains for minutes,
and says whether such a strategy ships.
"""

from __future__ import annotations

import itertools
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

LEARNERS = ("learned", "weighted")
PEERS = ("gradient_merit", "best_fixed")
"""Whom a learner has to beat."""


def left_out(known: Graphs, arms: Sequence[str]) -> list[torch.Tensor]:
    """Scores of the arms of each RNG seed, (A,), by networks that saw the others."""
    every = range(len(known.gains))
    return [learn(known, [other for other in every if other != seed], list(range(len(arms))))(seed) for seed in every]


def unseen_blueprint(known: Graphs, arms: Sequence[str]) -> list[torch.Tensor]:
    """The same, of networks that did not see the arm's blueprint either."""
    found = []
    for seed in range(len(known.gains)):
        others = [other for other in range(len(known.gains)) if other != seed]
        scores = torch.zeros(len(arms))
        for blueprint in choosing.BLUEPRINTS:
            mine = [place for place, arm in enumerate(arms) if arm.startswith(f"{blueprint} ")]
            rest = [place for place in range(len(arms)) if place not in mine]
            scores[mine] = learn(known, others, rest)(seed)[mine]
        found.append(scores)
    return found


def weighted(known: Graphs, arms: Sequence[str], found: list[Record]) -> list[torch.Tensor]:
    """Scores of the arms of each RNG seed, (A,): ranks by the cheap scores, each weighted by its mean rank correlation with the
    gains in the other RNG seeds. A score has no say on an arm of which it knows nothing.
    """
    names = list(found[0].of["scores"]["scores"])
    ranks = torch.zeros(len(found), len(names), len(arms), dtype=torch.double)
    worth = torch.full((len(found), len(names)), torch.nan, dtype=torch.double)
    for seed, name in itertools.product(range(len(found)), range(len(names))):
        told = found[seed].of["scores"]["scores"][names[name]]
        places = [place for place, arm in enumerate(arms) if told[arm] is not None]
        values = [told[arms[place]] for place in places]
        if len(places) > 2:  # fewer have no order to speak of
            order = torch.tensor(values).argsort().argsort().double()
            ranks[seed, name, places] = order / (len(places) - 1) - 0.5
            worth[seed, name] = growth_figures.rank_correlation(values, known.gains[seed, places].tolist())
    weights = [
        worth[[other for other in range(len(found)) if other != seed]].nanmean(0).nan_to_num() for seed in range(len(found))
    ]
    return list(torch.einsum("sk,ska->sa", torch.stack(weights), ranks))


def agreement(known: Graphs, scores: list[torch.Tensor]) -> float:
    """Mean over RNG seeds of the rank correlation of scores with gains."""
    pairs = zip(scores, known.gains, strict=True)
    return statistics.fmean(growth_figures.rank_correlation(told.tolist(), gains.tolist()) for told, gains in pairs)


def picks(known: Graphs, arms: Sequence[str], found: list[Record]) -> dict[str, list[int | None]]:
    """Place of the arm that each peer picks, by RNG seed; None: it grows nothing."""
    told: dict[str, list[int | None]] = {"best_fixed": []}
    for seed, record in enumerate(found):
        others = [other for other in range(len(found)) if other != seed]
        told["best_fixed"].append(int(known.gains[others].mean(0).argmax()))
        for name in growth_plan.PICKING:
            picked = record.of[f"pick:{name}"]["picked"]
            told.setdefault(name, []).append(list(arms).index(picked) if picked else None)
        for name, values in record.of["scores"]["scores"].items():
            if name != "merit":
                ranked = [-math.inf if values[arm] is None else values[arm] for arm in arms]
                told.setdefault(name, []).append(ranked.index(max(ranked)))
    return told


def reached(found: list[Record], picked: list[int | None], figure: str) -> list[float]:
    """What the picked arms ended with; the host continued where nothing was picked."""
    base = {"losses": "gate_loss", "audits": "audit_accuracy"}[figure]
    pairs = zip(found, picked, strict=True)
    return [record.of["continued"][base] if arm is None else getattr(record, figure)[arm] for record, arm in pairs]


def report(data: lab.Data, arms: Sequence[str], found: list[Record]) -> tuple[str, list[harness.Figure]]:
    """Everything there is to read, the verdict in its last line; and figures."""
    known = graphs(data, list(arms), found)
    scores = {"learned": left_out(known, arms), "weighted": weighted(known, arms, found)}
    told = {**{name: [int(of.argmax()) for of in by_seed] for name, by_seed in scores.items()}, **picks(known, arms, found)}
    losses = {name: reached(found, picked, "losses") for name, picked in told.items()}
    audits = {name: reached(found, picked, "audits") for name, picked in told.items()}
    losses["uniform"] = [statistics.fmean(record.losses) for record in found]
    audits["uniform"] = [statistics.fmean(record.audits) for record in found]
    best = [record.audits[record.losses.index(min(record.losses))] for record in found]
    size = sum(weight.numel() for weight in GraphNetwork(known.nodes.shape[-1]).parameters())
    rows = [
        f"A learned strategy ({size} parameters) and weighted scores: {len(found)} RNG seeds of {len(arms)} arms",
        "  regret: gate loss over the lowest; audit points below its arm; learned, weighted minus the other, points [95 % BCa]",
    ]
    over = {
        (learner, name): [100 * (mine - other) for mine, other in zip(audits[learner], audits[name], strict=True)]
        for learner in LEARNERS
        for name in losses
    }
    for name in sorted(losses, key=lambda name: statistics.fmean(losses[name])):
        regret = statistics.fmean(loss - min(record.losses) for loss, record in zip(losses[name], found, strict=True))
        behind = statistics.fmean(100 * (top - mine) for top, mine in zip(best, audits[name], strict=True))
        against = "".join(
            "                      "
            if learner == name
            else "  {:+.2f} [{:+.2f}, {:+.2f}]".format(*growth_figures.interval(over[learner, name]))
            for learner in LEARNERS
        )
        rows.append(f"  {name:20} {regret:.4f}  {behind:+.2f}{against}".rstrip())
    unseen = agreement(known, unseen_blueprint(known, arms))
    rows += [f"  rank correlation of {name} with the gains: {agreement(known, scores[name]):+.2f}" for name in LEARNERS]
    rows += [
        f"  of learned, for a blueprint that was left out of training: {unseen:+.2f}",
        "  Records are of one host: what another host needs cannot be in them.",
    ]
    for learner in LEARNERS:
        lows = {name: growth_figures.interval(over[learner, name])[1] for name in PEERS}
        rows.append(f"Verdict: {learner} {'ships' if ships(lows) else 'does not ship'}; {_because(lows)}")
    return "\n".join(rows), [_figure(learner, name, over[learner, name], audits[name]) for learner in LEARNERS for name in PEERS]


def ships(lows: dict[str, float]) -> bool:
    """Whether every lower end lies above 0."""
    return all(low > 0 for low in lows.values())


def _because(lows: dict[str, float]) -> str:
    few = "no interval of fewer than eight RNG seeds"
    return ", ".join(f"over {name}: {few if math.isinf(low) else f'lower end {low:+.2f} points'}" for name, low in lows.items())


def _figure(learner: str, peer: str, differences: list[float], audits: list[float]) -> harness.Figure:
    mean, baseline = statistics.fmean(differences), [100 * audit for audit in audits]
    return harness.Figure(
        name=f"{learner}_over_{peer}/mean",
        value=mean,
        unit="points",
        better="higher",
        repeats=tuple(differences),
        baseline=harness.Baseline(name=peer, value=statistics.fmean(baseline), repeats=tuple(baseline)),
        ratio=mean / statistics.fmean(baseline),
    )


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
    told, figures = report(data, plan["arms"], list(found.values()))
    print(told)
    if chosen.json is not None:
        settings = {"data": data.name, "rng_seeds": len(found), "protocol": lines.digest}
        harness.write(harness.results("learned", figures, quick=chosen.quick, settings=settings), chosen.json)


if __name__ == "__main__":
    main()
