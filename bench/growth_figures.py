"""What the lines of ``bench/growth.py`` say: paired differences with their intervals, shares, rank correlations; as figures and
as tables to read.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence

import growth_plan
import harness
import lab
import torch
from msgspec import structs

from esperd.growth.interval import mean_interval

POINTS = 100.0
SMALLEST_GAIN = 0.3
"""In points: a ratio to a gain that is smaller says nothing, and the difference is told instead."""
MEASURING = ("gradient_merit", "successive_halving")
PLAIN = ("first_arm", "uniform")
"""What choosing by the default strategy is compared with."""
EXHAUSTIVE = "exhaustive"
GROWN = "grown"
"""At the rate of the plan; ``grown_R`` at rate R."""


def _ran(lines: lab.Lines, **key: object) -> list[dict]:
    """Lines of runs that came to their end."""
    return [line for line in lines.of(**key) if "failed" not in line]


def _by_seed(lines: lab.Lines, part: str, arm: str) -> dict[int, dict]:
    return {line["rng_seed"]: line for line in _ran(lines, part=part, arm=arm)}


def continued(lines: lab.Lines) -> str:
    """The host continued, at the rate at which it did best; see :func:`_at_its_best`."""
    return _at_its_best(lines, "continued_")


def _at_its_best(lines: lab.Lines, name: str, part: str = "h1") -> str:
    """The rate that did best on the gate split, of those that were run for most RNG seeds, over the seeds that all of these were
    run for; the first one where there are none.
    """
    arms = sorted({line["arm"] for line in _ran(lines, part=part) if line["arm"].startswith(name)}, reverse=True)
    by_arm = {arm: _by_seed(lines, part, arm) for arm in arms}
    most = max(map(len, by_arm.values()))
    arms = [arm for arm in arms if len(by_arm[arm]) == most]
    common = set.intersection(*(set(by_arm[arm]) for arm in arms))
    return max(arms, key=lambda arm: sum(by_arm[arm][seed]["gate_accuracy"] for seed in common))


def differences(lines: lab.Lines, part: str, arm: str, other: str, of: str = "") -> list[float]:
    """Paired differences in points, by RNG seed; where an arm was run on several kinds of processor, those of one.

    Args:
        lines: known.
        part: of ``arm``.
        arm: minuend.
        other: subtrahend.
        of: part of ``other``; empty: the same.
    """
    mine, theirs = _ran(lines, part=part, arm=arm), _ran(lines, part=of or part, arm=other)
    pairs: dict[int, tuple[bool, float]] = {}
    for one, two in itertools.product(mine, theirs):
        seed, same = one["rng_seed"], one["processor"] == two["processor"]
        if seed == two["rng_seed"] and (seed not in pairs or same > pairs[seed][0]):
            pairs[seed] = (same, POINTS * (one["audit_accuracy"] - two["audit_accuracy"]))
    return [pairs[seed][1] for seed in sorted(pairs)]


def ablated(lines: lab.Lines) -> dict[str, list[float]]:
    """By ablation: what it ends with minus ``grown`` unchanged, in points; of each RNG seed every row from one kind of processor,
    that on which most arms of the seed were run.
    """
    runs: dict[tuple[int, str], dict[str, dict]] = {}
    for line in _ran(lines, part="ablations"):
        runs.setdefault((line["rng_seed"], line["processor"]), {})[line["arm"]] = line
    most: dict[int, dict[str, dict]] = {}
    for (seed, _), told in sorted(runs.items()):
        if growth_plan.UNCHANGED in told and len(told) > len(most.get(seed, {})):
            most[seed] = told
    found: dict[str, list[float]] = {}
    for told in most.values():
        for arm in sorted(set(told) - {"host", growth_plan.UNCHANGED}):
            difference = told[arm]["audit_accuracy"] - told[growth_plan.UNCHANGED]["audit_accuracy"]
            found.setdefault(arm, []).append(POINTS * difference)
    return found


def confirmed(lines: lab.Lines) -> tuple[str, str, list[float]] | None:
    """The host continued that a job's defaults are compared with, its part, and what they gain over it, in points; None until
    they have run. It is the one on their RNG seeds, or of H1 where that has the same ones; at its best rate by gate accuracy.
    """
    defaults = latest_defaults(lines)
    if not defaults:
        return None
    own = any(line["arm"].startswith("continued_") for line in _ran(lines, part=growth_plan.CONFIRM))
    part = growth_plan.CONFIRM if own else "h1"
    peer = _at_its_best(lines, "continued_", part)
    return peer, part, differences(lines, growth_plan.CONFIRM, defaults, peer, of=part)


def latest_defaults(lines: lab.Lines) -> str:
    """The newest defaults that were run by themselves; empty where none were."""
    names = (growth_plan.DEFAULTS, growth_plan.CONFIRMED_DEFAULTS)
    return next((name for name in names if _ran(lines, part=growth_plan.CONFIRM, arm=name)), "")


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean with its 95 % BCa interval."""
    return mean_interval(torch.tensor(values, dtype=torch.float64), 0.95, "bootstrap")


def sign_flip_p(values: Sequence[float]) -> float:
    """Exact two-sided p of a mean of paired differences, over all flips of their signs; of up to two dozen of them."""
    totals = torch.zeros(1, dtype=torch.float64)
    for value in values:
        totals = torch.cat((totals + value, totals - value))
    return float((totals.abs() >= abs(sum(values)) - 1e-12).double().mean())


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment over a family (1979)."""
    adjusted, running = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        running = max(running, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = running
    return adjusted


# --- choosing ------------------------------------------------------------------------------------------------------------


def chosen_lines(lines: lab.Lines) -> dict[int, dict[str, dict]]:
    """By RNG seed, the lines of every arm and every pick, all of one kind of processor; without the seeds that lack some."""
    picks = [f"{kind}:{name}" for name in growth_plan.PICKING for kind in ("pick", "continued")]
    arms = [f"arm:{arm}" for arm in lines.protocol["plan"]["arms"]]
    wanted = {"scores", "continued", *arms, *picks} - {"continued:first_arm"}
    known: dict[tuple[int, str], dict[str, dict]] = {}
    for line in _ran(lines, part="h2"):
        known.setdefault((line["rng_seed"], line["processor"]), {})[line["arm"]] = line
    found: dict[int, dict[str, dict]] = {}
    for (seed, _), told in sorted(known.items()):
        if wanted <= set(told):
            found.setdefault(seed, told)
    return found


def complete_choices(lines: lab.Lines) -> list[int]:
    """RNG seeds of which every arm and every pick is known, from one kind of processor."""
    return list(chosen_lines(lines))


def choices(lines: lab.Lines) -> dict[str, dict[int, dict[str, float]]]:
    """By strategy and RNG seed: the audit accuracy its pick ends with, its gain over the host continued for as many FLOPs (in
    points), and the FLOPs of choosing and training over those of training every arm.
    """
    found: dict[str, dict[int, dict[str, float]]] = {}
    for seed, of in chosen_lines(lines).items():
        arms = {name.removeprefix("arm:"): line for name, line in of.items() if name.startswith("arm:")}
        base, budget = of["continued"]["audit_accuracy"], _arm_epochs(lines)
        every = budget * len(arms)
        best = min(arms.values(), key=lambda line: line["gate_loss"])
        told = {
            EXHAUSTIVE: (best["audit_accuracy"], base, 1.0),
            "uniform": (statistics.fmean(line["audit_accuracy"] for line in arms.values()), base, budget / every),
        }
        for strategy in growth_plan.PICKING:
            pick = of[f"pick:{strategy}"]
            same = of.get(f"continued:{strategy}", of["continued"])["audit_accuracy"]
            reached = arms[pick["picked"]]["audit_accuracy"] if pick["picked"] else same
            told[strategy] = (reached, same, (budget + pick["cost"]) / every)
        for strategy, (reached, same, share) in told.items():
            gain = POINTS * (reached - same)
            found.setdefault(strategy, {})[seed] = {
                "accuracy": reached,
                "gain": gain,
                "over_base": POINTS * (reached - base),
                "share": share,
            }
    return found


def _arm_epochs(lines: lab.Lines) -> float:
    return float(lines.protocol["plan"]["h2"]["arm_epochs"])


def effectiveness(gains: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Mean gain of a strategy over another's, minus 1, with its 95 % interval: every ratio r for which the BCa interval of
    ``gain - (1 + r) other`` over RNG seeds holds 0 (Fieller's way, 1954). A bootstrap of the ratio itself changes its sign where
    the other's gain is drawn near 0. Infinite where the other may gain nothing, and of fewer than eight RNG seeds.
    """
    mean = statistics.fmean(gains) / statistics.fmean(others) - 1
    _, least, most = interval(others)
    if least <= 0 <= most:
        return mean, -math.inf, math.inf

    def excluded(ratio: float) -> bool:
        _, low, high = interval([one - (1 + ratio) * two for one, two in zip(gains, others, strict=True)])
        return not low <= 0 <= high

    return mean, _edge(excluded, mean, -1), _edge(excluded, mean, +1)


def _edge(excluded: Callable[[float], bool], inside: float, direction: int) -> float:
    """Where what is excluded begins, to a thousandth; infinite when not within 64 of what is not."""
    outside = inside + 0.25 * direction
    while not excluded(outside):
        if abs(outside - inside) > 64:
            return direction * math.inf
        inside, outside = outside, outside + 2 * (outside - inside)
    while abs(outside - inside) > 1e-3:
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if excluded(middle) else (middle, outside)
    return inside


def better_by(mine: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float, str]:
    """How much better a strategy chooses, from what it and another one gain by RNG seed, with its interval: the ratio of gains
    minus 1, or the difference in points where the other's gain is too small for a ratio; and the unit.
    """
    if statistics.fmean(theirs) > SMALLEST_GAIN:
        return *effectiveness(mine, theirs), "ratio - 1"
    return *interval([one - two for one, two in zip(mine, theirs, strict=True)]), "points"


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, without ties in mind: scores are measured numbers."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (first, second)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def calibration(lines: lab.Lines) -> dict[str, tuple[list[float], float]]:
    """By score: its rank correlation with what arms brought in the end (gate loss), for each RNG seed; and its mean cost in
    host-epochs.
    """
    found: dict[str, tuple[list[float], list[float]]] = {}
    again = _by_seed(lines, "calibration", "behind")
    for seed, of in chosen_lines(lines).items():
        brought = {name.removeprefix("arm:"): -line["gate_loss"] for name, line in of.items() if name.startswith("arm:")}
        scores, costs = dict(of["scores"]["scores"]), dict(of["scores"]["costs"])
        scores["contribution"] = {name: of[f"arm:{name}"]["contribution"] for name in brought}
        costs["contribution"] = _arm_epochs(lines) * len(brought)
        if seed in again:
            named = {name: f"{name} again" if name in scores else name for name in again[seed]["scores"]}
            scores |= {named[name]: values for name, values in again[seed]["scores"].items()}
            costs |= {named[name]: cost for name, cost in again[seed]["costs"].items()}
        for name, values in scores.items():
            known = [arm for arm in brought if values.get(arm) is not None]
            if len(known) > 2:
                correlations, spent = found.setdefault(name, ([], []))
                correlations.append(rank_correlation([values[arm] for arm in known], [brought[arm] for arm in known]))
                spent.append(costs[name])
    return {name: (correlations, statistics.fmean(spent)) for name, (correlations, spent) in found.items()}


# --- figures and tables --------------------------------------------------------------------------------------------------


def figures(lines: lab.Lines) -> list[harness.Figure]:
    """What the protocol promises, as far as it is known: of fewer than eight RNG seeds no interval is."""
    found = []
    h1 = "h1" if confirmed(lines) is None else "h1_by_hand"  # `grown`, until it is known what a job's defaults come to
    if _by_seed(lines, "h1", "grown") and any(line["arm"].startswith("continued_") for line in _ran(lines, part="h1")):
        peers = {f"{h1}_vs_continue/lower95": continued(lines), f"{h1}_vs_scratch_marginal/lower95": "scratch_marginal"}
        found += [_difference(lines, name, peer, lower=True) for name, peer in peers.items() if _ran(lines, part="h1", arm=peer)]
        if tuned := _at_its_best(lines, "grown_") if _other_rates(lines) else "":
            best = max((GROWN, tuned), key=lambda arm: _gate(lines, arm))
            found.append(_difference(lines, f"{h1}_vs_continue_tuned/lower95", continued(lines), lower=True, arm=best))
        if _ran(lines, part="h1", arm="scratch_total"):
            found.append(_difference(lines, f"{h1}_vs_scratch_total/mean", "scratch_total", lower=False))
    chosen = choices(lines)
    if chosen:
        best = growth_plan.STRATEGY
        gains = {name: [by_seed[seed]["over_base"] for seed in sorted(by_seed)] for name, by_seed in chosen.items()}
        share = statistics.fmean(gains[best]) / statistics.fmean(gains[EXHAUSTIVE])
        found.append(_figure("h2_gain_share", share, "share", "higher", gains[best], EXHAUSTIVE, 1.0, gains[EXHAUSTIVE]))
        flops = [by["share"] for by in chosen[best].values()]
        found.append(_figure("h2_flops_share", statistics.fmean(flops), "share", "lower", flops, EXHAUSTIVE, 1.0, [1.0]))
        mine, fixed = ([by["gain"] for by in chosen[name].values()] for name in (best, "first_arm"))
        _, lower, _, unit = better_by(mine, fixed)
        mean = statistics.fmean(fixed)
        found.append(_figure("ae_over_fixed/lower95", lower, unit, "higher", mine, "first_arm", mean, fixed))
    if gains := growing_by(lines):
        mine = gains[growth_plan.STRATEGY]
        for name in PLAIN:
            _, lower, _, unit = better_by(mine, gains[name])
            mean = statistics.fmean(gains[name])
            found.append(_figure(f"growing_by_{name}/lower95", lower, unit, "higher", mine, name, mean, gains[name]))
        _, lower, _ = interval(gains[growth_plan.TUNED_DEFAULTS])
        peer = continued(lines)
        theirs = [POINTS * line["audit_accuracy"] for line in _ran(lines, part="h1", arm=peer)]
        mean = statistics.fmean(theirs)
        repeats = gains[growth_plan.TUNED_DEFAULTS]
        found.append(_figure("defaults_vs_continue/lower95", lower, "points", "higher", repeats, peer, mean, theirs))
    if against := confirmed(lines):
        peer, part, values = against
        _, lower, _ = interval(values)
        theirs = [POINTS * line["audit_accuracy"] for line in _ran(lines, part=part, arm=peer)]
        mean = statistics.fmean(theirs)
        found.append(_figure("h1_vs_continue/lower95", lower, "points", "higher", values, peer, mean, theirs))
        for other, name in (("scratch_marginal", "lower95"), ("scratch_total", "mean")):
            if _ran(lines, part=growth_plan.CONFIRM, arm=other):
                values = differences(lines, growth_plan.CONFIRM, growth_plan.CONFIRMED_DEFAULTS, other)
                mean, lower, _ = interval(values)
                theirs = [POINTS * line["audit_accuracy"] for line in _ran(lines, part=growth_plan.CONFIRM, arm=other)]
                value = lower if name == "lower95" else mean
                told = (
                    f"h1_vs_{other}/{name}",
                    value,
                    "points",
                    "higher",
                    values,
                    other,
                    statistics.fmean(theirs),
                    theirs,
                )
                found.append(_figure(*told))
    of_text = "text_" if "windows" in lines.protocol["plan"] else ""
    return [structs.replace(figure, name=of_text + figure.name) for figure in found if math.isfinite(figure.value)]


def _other_rates(lines: lab.Lines) -> list[str]:
    return sorted({line["arm"] for line in _ran(lines, part="h1") if line["arm"].startswith("grown_")})


def _gate(lines: lab.Lines, arm: str) -> float:
    return statistics.fmean(line["gate_accuracy"] for line in _ran(lines, part="h1", arm=arm))


def _difference(lines: lab.Lines, name: str, peer: str, *, lower: bool, arm: str = GROWN) -> harness.Figure:
    values = differences(lines, "h1", arm, peer)
    mean, low, _ = interval(values)
    theirs = [POINTS * line["audit_accuracy"] for line in _ran(lines, part="h1", arm=peer)]
    return _figure(name, low if lower else mean, "points", "higher", values, peer, statistics.fmean(theirs), theirs)


def _figure(
    name: str, value: float, unit: str, better: str, repeats: Sequence[float], peer: str, baseline: float, theirs: Sequence[float]
) -> harness.Figure:
    return harness.Figure(
        name=name,
        value=value,
        unit=unit,
        better="higher" if better == "higher" else "lower",
        repeats=tuple(repeats),
        baseline=harness.Baseline(name=peer, value=baseline, repeats=tuple(theirs)),
        ratio=value / baseline,
    )


def tables(lines: lab.Lines) -> str:
    """Everything that is known, to read."""
    failed = [
        f"  failed: {line['part']} {line['arm']} of RNG seed {line['rng_seed']}: {line['failed']}" for line in _failed(lines)
    ]
    return "\n".join(
        [
            *_improving(lines),
            *_choosing(lines),
            *_calibrating(lines),
            *_growing_by(lines),
            *_confirming(lines),
            *_ablating(lines),
            *failed,
        ]
    )


def _failed(lines: lab.Lines) -> list[dict]:
    return [line for line in lines.lines if "failed" in line]


def _improving(lines: lab.Lines) -> list[str]:
    grown = _by_seed(lines, "h1", "grown")
    if not grown:
        return []
    others = _other_rates(lines)
    peers = sorted({line["arm"] for line in _ran(lines, part="h1")} - {GROWN, "host", *others})
    told = ["", "H1: points of audit accuracy, grown minus the other, mean over RNG seeds [95 % BCa]; its price beside it"]
    rows = {peer: differences(lines, "h1", "grown", peer) for peer in peers}
    adjusted = holm({peer: sign_flip_p(values) for peer, values in rows.items() if values})
    told.append(f"  {'grown':18} {_price(list(grown.values()))}")
    for peer in peers:
        if rows[peer]:
            mean, low, high = interval(rows[peer])
            told.append(
                f"  {peer:18} {mean:+.2f} [{low:+.2f}, {high:+.2f}]  n={len(rows[peer])}  p={sign_flip_p(rows[peer]):.3f}, "
                f"{adjusted[peer]:.3f} (Holm)  "
                f"{_price(_ran(lines, part='h1', arm=peer))}"
            )
    best = continued(lines) if others else ""
    for arm in others:
        mean, low, high = interval(differences(lines, "h1", arm, best))
        told.append(f"  {arm} minus {best}: {mean:+.2f} [{low:+.2f}, {high:+.2f}]  {_price(_ran(lines, part='h1', arm=arm))}")
    gates = ", ".join(f"{arm} {POINTS * _gate(lines, arm):.2f}" for arm in (GROWN, *others, *peers) if "scratch" not in arm)
    return [*told, f"  mean accuracy on the gate split: {gates}"]


def _price(found: list[dict]) -> str:
    accuracy = POINTS * statistics.fmean(line["audit_accuracy"] for line in found)
    parameters = statistics.fmean(line["parameters"] for line in found)
    inference = statistics.fmean(line["flops_per_sample"] for line in found) / 1e3
    seconds = statistics.median(line["seconds"] for line in found)
    return f"{accuracy:.2f} %, {parameters:,.0f} parameters, {inference:,.0f} kFLOPs a sample, {seconds:.0f} s of processor time"


def _choosing(lines: lab.Lines) -> list[str]:
    chosen = choices(lines)
    if not chosen:
        return []
    told = [
        "",
        "H2: gain over the host continued for the same FLOPs, in points of audit accuracy [95 % BCa]; FLOPs over exhaustive",
    ]
    gains = {name: [by["gain"] for by in by_seed.values()] for name, by_seed in chosen.items()}
    shares = {name: statistics.fmean(by["share"] for by in by_seed.values()) for name, by_seed in chosen.items()}
    for name, row in _rows(gains, ordered=True):
        told.append(f"{row}  {shares[name]:.0%} of the FLOPs")
    for name in MEASURING:
        for other in ("first_arm", "uniform"):
            better, low, high, unit = better_by(*([by["gain"] for by in chosen[one].values()] for one in (name, other)))
            told.append(f"  adaptation effectiveness of {name} over {other}: {better:+.2f} [{low:+.2f}, {high:+.2f}] {unit}")
    return told


def _calibrating(lines: lab.Lines) -> list[str]:
    known = calibration(lines)
    if not known:
        return []
    told = ["", "Scores: rank correlation with what arms brought in the end, mean over RNG seeds (range); cost in host-epochs"]
    for name, (values, cost) in sorted(known.items(), key=lambda item: -statistics.fmean(item[1][0])):
        told.append(f"  {name:20} {statistics.fmean(values):+.2f} ({min(values):+.2f} to {max(values):+.2f})  {cost:.1f}")
    return told


def growing_by(lines: lab.Lines) -> dict[str, list[float]]:
    """By strategy: what growing by it gains over the host continued, in points, for RNG seeds that all of them were run for;
    empty when there is none.
    """
    if not _ran(lines, part="strategies", arm="first_arm"):
        return {}
    told, base = (*growth_plan.STRATEGIES,), continued(lines)
    runs = [_by_seed(lines, "h1", "grown"), *(_by_seed(lines, "strategies", name) for name in told), _by_seed(lines, "h1", base)]
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in runs)))
    names, against = (growth_plan.STRATEGY, *told), runs[-1]
    return {
        name: [POINTS * (by_seed[seed]["audit_accuracy"] - against[seed]["audit_accuracy"]) for seed in seeds]
        for name, by_seed in zip(names, runs[:-1], strict=True)
        if seeds
    }


def _growing_by(lines: lab.Lines) -> list[str]:
    gains = growing_by(lines)
    told = ["", "Growing by a strategy: gain over the host continued for the same FLOPs, points of audit accuracy [95 % BCa]"]
    told += [row for _, row in _rows(gains)]
    for name in PLAIN if gains else ():
        better, low, high, unit = better_by(gains[growth_plan.STRATEGY], gains[name])
        told.append(f"  adaptation effectiveness over {name}: {better:+.2f} [{low:+.2f}, {high:+.2f}] {unit}")
    return told if gains else []


def _confirming(lines: lab.Lines) -> list[str]:
    against = confirmed(lines)
    if against is None:
        return []
    peer, _, values = against
    defaults = latest_defaults(lines)

    def row(values: list[float], price: list[dict]) -> str:
        mean, low, high = interval(values)
        return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]  n={len(values)}  p={sign_flip_p(values):.3f}  {_price(price)}"

    own = _ran(lines, part=growth_plan.CONFIRM, arm=defaults)
    told = ["", f"A job's defaults ({defaults}) minus {peer}, points of audit accuracy [95 % BCa]", f"  {row(values, own)}"]
    for name in dict.fromkeys((defaults, growth_plan.CONFIRMED_DEFAULTS)):
        pairs = {other: differences(lines, growth_plan.CONFIRM, name, other) for other in confirmed_against(lines)}
        told += [
            f"  {name} minus {other}: {row(values, _ran(lines, part=growth_plan.CONFIRM, arm=other))}"
            for other, values in pairs.items()
            if values
        ]
    return told


def confirmed_against(lines: lab.Lines) -> list[str]:
    """What was run beside the defaults on their own RNG seeds."""
    defaults = {growth_plan.DEFAULTS, growth_plan.CONFIRMED_DEFAULTS}
    return sorted({line["arm"] for line in _ran(lines, part=growth_plan.CONFIRM)} - {"host", *defaults})


def _ablating(lines: lab.Lines) -> list[str]:
    changed = ablated(lines)
    told = ["", "Ablations: points of audit accuracy, changed minus unchanged [95 % BCa]"] if changed else []
    told += [row for _, row in _rows(changed)]
    later = further(lines)
    if later:
        told += ["", "Further: points of audit accuracy, changed minus `grown` of H1, or what is named, [95 % BCa]"]
    return told + [row for _, row in _rows(later)]


def further(lines: lab.Lines) -> dict[str, list[float]]:
    """By arm of this part: what it ends with minus ``grown`` of H1, in points; and a random birth minus a birth as zero."""
    found = {name: differences(lines, "further", name, GROWN, of="h1") for name in growth_plan.FURTHER}
    found["born random, not zero"] = differences(lines, "birth", "random", "zero")
    return {name: values for name, values in found.items() if values}


def _rows(family: dict[str, list[float]], *, ordered: bool = False) -> list[tuple[str, str]]:
    """Of each member of a family its mean with its interval, its number of RNG seeds, and its p by Holm over the family."""
    adjusted = holm({name: sign_flip_p(values) for name, values in family.items()})
    told = []
    for name, values in sorted(family.items(), key=lambda item: -statistics.fmean(item[1])) if ordered else family.items():
        mean, low, high = interval(values)
        p = f"p={sign_flip_p(values):.3f}, {adjusted[name]:.3f} (Holm)"
        told.append((name, f"  {name:20} {mean:+.2f} [{low:+.2f}, {high:+.2f}]  n={len(values)}  {p}"))
    return told
