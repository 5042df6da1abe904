"""The model card: ``README.md`` beside an export, as model hubs read it. Every number in it was measured by the job."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from esperd.growth.export import BUILTIN_HOSTS, STRUCTURE, ExportedSeed, GrowthFile
from esperd.growth.merge import TOLERANCE
from esperd.growth.parity import Parity
from esperd.messages.card import CARD, MARK, is_users_own
from esperd.messages.growth import Contribution, Trial
from esperd.messages.reports import Comparison, Metrics, Report, SeedOutcome

REPORT = "report.json"

KNOWN_METRICS = frozenset({"accuracy"})
"""Metrics whose name means the same to a model hub."""

UNKNOWN = "–"  # noqa: RUF001 - a dash, as tables write it
Row = tuple[str, ...]


def write_card(directory: Path, parities: Sequence[Parity] = ()) -> Path | None:
    """Write the card of an export, from the files of the export.

    Args:
        directory: holds ``growth.json``, and ``report.json`` where the job left one.
        parities: of other forms that were written beside it.

    Returns:
        The card; None when a ``README.md`` stands there that is not esperd's, which is left alone.
    """
    path = directory / CARD
    if is_users_own(path):
        return None
    structure = msgspec.json.decode((directory / STRUCTURE).read_bytes(), type=GrowthFile)
    told = directory / REPORT
    report = msgspec.json.decode(told.read_bytes(), type=Report) if told.exists() else None
    partial = directory / f".{CARD}.writing"
    partial.write_text(card(structure, report, parities), encoding="utf-8")
    partial.replace(path)
    return path


def card(structure: GrowthFile, report: Report | None = None, parities: Sequence[Parity] = ()) -> str:
    """The card as Markdown with a YAML head.

    Keys of the head that esperd cannot know, such as the license, are left to the user.

    Args:
        structure: ``growth.json``.
        report: ``report.json``; None: what only it holds is left out.
        parities: of other forms that were written beside it.
    """
    if report is not None and report.job != structure.manifest.get("job"):
        report = None  # of another job: somebody copied files together
    parts = [
        *_head(report),
        f"# {_text(structure.manifest.get('name') or structure.host.factory)}",
        _summary(structure),
        "## What it is",
        _table(("", ""), _facts(structure, report)),
        "## How good it is",
        *_quality(structure, report),
        "## Seeds",
        *_seeds(structure),
        *_costs(report),
        "## How to load it",
        *_loading(structure, parities),
        *_parities(parities),
    ]
    return "\n\n".join(parts) + "\n"


def _head(report: Report | None) -> Iterator[str]:
    lines = ["---", "library_name: esperd", "tags:", "- esperd", "- growing-network", "- pytorch"]
    if report is not None and report.metric_name in KNOWN_METRICS:
        lines += ["metrics:", f"- {report.metric_name}"]
    yield "\n".join([*lines, "---", MARK])


def _summary(structure: GrowthFile) -> str:
    told = "A neural network that esperd grew while it trained."
    told += f" Seeds that germinated: {len(structure.history)}; part of the network: {len(structure.seeds)}"
    folded = len(_folded(structure))
    return told + (f"; folded into layers of the host: {folded}." if folded else ".")


def _facts(structure: GrowthFile, report: Report | None) -> Iterator[Row]:
    manifest = structure.manifest
    options = json.dumps(structure.host.options, sort_keys=True, ensure_ascii=False)
    yield "host", f"{_code(structure.host.factory)} with {_code(options)}"
    yield "takes", _code(f"({', '.join(('B', *map(str, structure.input.shape)))}) {structure.input.dtype}")
    if manifest.get("data") is not None:
        yield "data", _code(str(manifest["data"]))
    if manifest.get("data_sha256") is not None:
        yield "fingerprint of the data", _code(f"sha256:{manifest['data_sha256']}")
    if report is not None and not _folded(structure):  # folding took parameters away that the report counts
        yield "parameters", f"{report.grown.parameters:,}"
        yield "forward FLOPs per sample", f"{report.grown.flops_per_sample:,.0f}"
    for key, what in (("job", "job"), ("job_sha256", "digest of the job"), ("rng_seed", "RNG seed")):
        if manifest.get(key) is not None:
            yield what, _code(str(manifest[key]))
    yield "weights", _code(f"sha256:{structure.weights_sha256}")
    yield "written by", f"esperd {_text(structure.esperd)}, torch {_text(structure.torch)}"
    if report is not None:
        yield "trained on", _text(report.device)


def _quality(structure: GrowthFile, report: Report | None) -> Iterator[str]:
    audit = "On the audit split: samples that no decision looked at, read once, at the end."
    if report is None:
        measured = [(what, structure.manifest.get(key)) for key, what in (("audit_loss", "loss"), ("audit_metric", "metric"))]
        known = [(what, f"{value:.4f}") for what, value in measured if isinstance(value, int | float)]
        yield audit + _since(structure) if known else "The export holds no measurement."
        if known:
            yield _table(("", "grown"), known)
        return
    yield audit + _since(structure)
    columns = [("grown", report.grown)] + ([("control", report.control)] if report.control is not None else [])
    yield _table(("", *(name for name, _ in columns)), _measured([metrics for _, metrics in columns], report.metric_name))
    if report.comparison is not None:
        yield _compared(report.comparison, report.metric_name)
    elif report.control is None:
        yield (
            "The job ran no control (the same host, trained without growing for the same FLOPs): whether growing paid is not"
            " known."
        )


def _since(structure: GrowthFile) -> str:
    """What was done with the network after it was measured."""
    if not _folded(structure):
        return ""
    return (
        " Seeds were folded into layers after that; no fold changed an output by more than"
        f" {TOLERANCE:.0e}, relative to 1 + |output|."
    )


def _measured(columns: Sequence[Metrics], metric_name: str | None) -> Iterator[Row]:
    yield "loss", *(f"{metrics.loss:.4f}" for metrics in columns)
    if any(metrics.metric is not None for metrics in columns):
        name = _text(metric_name or "metric")
        yield name, *(UNKNOWN if metrics.metric is None else f"{metrics.metric:.4f}" for metrics in columns)
    yield "parameters", *(f"{metrics.parameters:,}" for metrics in columns)
    yield "forward FLOPs per sample", *(f"{metrics.flops_per_sample:,.0f}" for metrics in columns)
    yield "FLOPs spent in training", *(f"{metrics.training_flops:.3e}" for metrics in columns)
    yield "seconds of training", *(f"{metrics.training_seconds:.1f}" for metrics in columns)
    yield "epochs", *(f"{metrics.epochs:.1f}" for metrics in columns)


def _compared(found: Comparison, metric_name: str | None) -> str:
    told = (
        f"Paired over {found.samples:,} samples ({found.confidence:.0%} intervals): the control's loss minus the grown network's"
    )
    told += f" is {_interval(found.loss, found.loss_lower, found.loss_upper)}"
    if found.metric is not None and found.metric_lower is not None and found.metric_upper is not None:
        name = _text(metric_name or "metric")
        told += f"; the grown network's {name} minus the control's is"
        told += f" {_interval(found.metric, found.metric_lower, found.metric_upper)}"
    return told + ". An interval that holds 0 shows no difference."


def _seeds(structure: GrowthFile) -> Iterator[str]:
    ends = {outcome.seed: outcome for outcome in structure.history}
    if structure.seeds:
        yield "Part of the network:"
        known = ("seed", "blueprint", "slot", "operator", "alpha", "parameters", "FLOPs", "germinated")
        yield _table((*known, "contribution", "trial", "why"), (_kept(seed, ends.get(seed.name)) for seed in structure.seeds))
    standing = {seed.name for seed in structure.seeds}
    others = [outcome for outcome in structure.history if outcome.seed not in standing]
    if others:
        yield "No longer in it:"
        names = ("seed", "blueprint", "slot", "end", "epochs", "parameters", "FLOPs", "contribution", "trial", "why")
        folded = _folded(structure)
        yield _table(names, (_ended(outcome, folded=outcome.seed in folded) for outcome in others))
    if not structure.seeds and not others:
        yield "None germinated."
    if any(outcome.contribution is not None for outcome in structure.history):
        yield (
            "A contribution is the mean loss without the seed minus with it, paired by sample of the gate split, with its"
            " interval. Its known limit: the host adapts to its seeds, so it overstates what a seed brought. It does not say"
            " that the network would be worse had the seed never been grown; only the control does."
        )
    if any(seed.slot.topology == "transformer" for seed in structure.seeds):
        yield (
            "A seed keeps no key/value cache. Where the host generates token by token with one, as Hugging Face's `generate`"
            " does, a seed that looks at other tokens (attention) would see the newest alone: generate with `use_cache=False`."
        )
    if any(outcome.trial is not None for outcome in structure.history):
        yield (
            "A trial is what the network with the seed has over its twin without it after both trained on, from one state, for"
            " the same FLOPs, paired by sample of the gate split."
        )


def _kept(seed: ExportedSeed, outcome: SeedOutcome | None) -> Row:
    told: tuple[str, ...] = (UNKNOWN, UNKNOWN, UNKNOWN)
    if outcome is not None:
        told = (_effect(outcome.contribution), _effect(outcome.trial), _text(outcome.reason))
    return (
        _code(seed.name),
        _code(seed.blueprint),
        _code(seed.slot.slot),
        seed.operator,
        f"{seed.alpha:g}",
        f"{seed.parameters:,}",
        f"{seed.flops_per_sample:,.0f}",
        f"epoch {seed.germinated_epoch}",
        *told,
    )


def _ended(outcome: SeedOutcome, *, folded: bool) -> Row:
    return (
        _code(outcome.seed),
        _code(outcome.blueprint),
        _code(outcome.slot),
        "folded into a layer beside it" if folded else str(outcome.stage),
        f"{outcome.germinated_epoch} to {outcome.ended_epoch}",
        f"{outcome.parameters:,}",
        f"{outcome.flops_per_sample:,.0f}",
        _effect(outcome.contribution),
        _effect(outcome.trial),
        _text(outcome.reason),
    )


def _folded(structure: GrowthFile) -> frozenset[str]:
    """Seeds that a merge folded: they were kept, and are no module of their own any more."""
    return frozenset(map(str, structure.manifest.get("merged") or ()))


def _effect(measured: Contribution | Trial | None) -> str:
    if measured is None:
        return "not measured"
    told = _interval(measured.loss, measured.lower, measured.upper)
    return f"{told} at {measured.confidence:.0%}, {measured.samples:,} samples"


def _costs(report: Report | None) -> Iterator[str]:
    if report is None:
        return
    yield "## What it cost"
    yield _table(("FLOPs spent on", ""), ((_text(purpose), f"{spent:.3e}") for purpose, spent in sorted(report.flops.items())))
    told = "Everything is charged: training, incubation, ablations, gate passes, and seeds that were culled."
    if report.resumed:
        told += f" The job went on from a checkpoint {_count(report.resumed, 'time')}."
    if report.policy_unavailable:
        told += f" At {_count(report.policy_unavailable, 'decision point')} the policy could not be reached."
    yield told


def _loading(structure: GrowthFile, parities: Sequence[Parity]) -> Iterator[str]:
    yield "With esperd (`pip install esperd`), in the directory of this file. No daemon is needed; no code from the files is run."
    calls = (f"x = {_drawn(structure)}", "outputs = network(x)")
    yield _python("import esperd", "import torch", "", *_load_lines(structure), *calls)
    yield "As an ordinary `torch.nn.Module`, without esperd's hooks, to train on, to compile or to quantise:"
    yield _python("from esperd.growth.plain import plain_module", "", "model = plain_module(network)")
    for parity in parities:
        if parity.form == "torch.export":
            yield (
                f"`{parity.file}` needs torch alone, neither esperd nor the host's code. It evaluates and cannot train. torch"
                " reads it with pickle, so load it only if you trust where it comes from:"
            )
            yield _python("import torch", "", f'program = torch.export.load("{parity.file}").module()', "outputs = program(x)")
        else:
            yield f"`{parity.file}` runs in any ONNX runtime:"
            yield _python(
                "import onnxruntime",
                "",
                f'session = onnxruntime.InferenceSession("{parity.file}")',
                'outputs = session.run(None, {"input": x.numpy()})',
            )


def _load_lines(structure: GrowthFile) -> Iterator[str]:
    if structure.host.factory.startswith(BUILTIN_HOSTS):
        yield 'network = esperd.load(".")'
        return
    yield f"# The host is code of its own: import_host=True imports {_comment(structure.host.factory)}. Only if you trust it!"
    yield '# Or hand it over: esperd.load(".", host=...), the module or the function that builds it.'
    yield 'network = esperd.load(".", import_host=True)'


def _drawn(structure: GrowthFile) -> str:
    shape = ", ".join(map(str, (2, *structure.input.shape)))
    if structure.input.dtype == "float32":
        return f"torch.rand({shape})"
    return f"torch.ones({shape}, dtype=torch.{structure.input.dtype})"


def _parities(parities: Sequence[Parity]) -> Iterator[str]:
    if not parities:
        return
    yield "## Parity"
    yield "Each file was read again and run on the same inputs as the network, evaluating; difference relative to 1 + |output|."
    names = ("file", "run by", "batch sizes", "largest difference", "allowed")
    yield _table(
        names,
        (
            (
                _code(parity.file),
                _text(parity.runtime),
                ", ".join(map(str, parity.batch_sizes)),
                f"{parity.largest_difference:.1e}" if parity.largest_difference else "0",
                f"{parity.tolerance:.0e}",
            )
            for parity in parities
        ),
    )


# --- Markdown ------------------------------------------------------------------------------------------------------------


def _table(names: Row, rows: Iterator[Row] | Sequence[Row]) -> str:
    lines = [names, tuple("---" for _ in names), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _text(words: object) -> str:
    """Words of a job, of a plugin: one line, and no code, link, element or cell of theirs."""
    plain = " ".join(str(words).split()).replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[\\`\[|]", r"\\\g<0>", plain)


def _code(words: str) -> str:
    """A name as code; a backtick would end it, and a bar the cell."""
    return f"`{' '.join(words.split()).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def _comment(words: str) -> str:
    return " ".join(words.split())


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _interval(mean: float, lower: float, upper: float) -> str:
    return f"{mean:+.4f} [{lower:+.4f}, {upper:+.4f}]"
