"""Whether growth paid: against the same host, trained with the same FLOPs, on samples neither network was chosen on."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from esperd.messages.reports import Comparison, Metrics, Report
from esperd.report import numbers


class Paid(enum.StrEnum):
    """What a job's comparison shows."""

    YES = "growth paid"
    NO = "growth did not pay"
    UNDECIDED = "no difference shown"
    UNKNOWN = "not known"


@dataclass(frozen=True)
class Judgement:
    """The verdict and the sentence that says it."""

    paid: Paid
    because: str
    price: str = ""
    """What the grown network costs beyond the control; empty when there is none to compare with."""

    def __str__(self) -> str:
        return f"{self.paid}: {self.because}" + (f"; price: {self.price}" if self.price else "")


def judge(report: Report) -> Judgement:
    """Say whether growth paid.

    Accuracy decides where the job measured it, else the loss: of any other metric esperd does not know which direction is
    better. An interval that holds 0 shows no difference, whatever its mean.
    """
    if report.grown.epochs == 0.0:
        return Judgement(Paid.UNKNOWN, "nothing was trained: the budget was spent before the first step; raise it")
    if report.control is None:
        return Judgement(Paid.UNKNOWN, "the job ran no control (control = true adds one)")
    if report.comparison is None:
        return Judgement(Paid.UNKNOWN, "grown network and control were not compared", _price(report.grown, report.control))
    paid, because = _compare(report.comparison, report.metric_name)
    return Judgement(paid, because, _price(report.grown, report.control))


def _compare(measured: Comparison, metric_name: str | None) -> tuple[Paid, str]:
    of_loss = _loss_difference(measured)
    lower, upper = measured.metric_lower, measured.metric_upper
    if metric_name == "accuracy" and measured.metric is not None and lower is not None and upper is not None:
        points = f"{measured.metric * 100:+.2f} points of accuracy [{lower * 100:+.2f}, {upper * 100:+.2f}]"
        return _side(lower, upper), f"{points} ({of_loss})"
    return _side(measured.loss_lower, measured.loss_upper), of_loss


def _loss_difference(measured: Comparison) -> str:
    mean, ends, word = measured.loss, (measured.loss_lower, measured.loss_upper), "lower"
    if mean < 0:
        mean, ends, word = -mean, (-ends[1], -ends[0]), "higher"
    return f"loss {mean:.4f} {word} [{ends[0]:.4f}, {ends[1]:.4f}]"


def _side(lower: float, upper: float) -> Paid:
    if lower > 0:
        return Paid.YES
    return Paid.NO if upper < 0 else Paid.UNDECIDED


def _price(grown: Metrics, control: Metrics) -> str:
    parameters = grown.parameters - control.parameters
    flops = grown.flops_per_sample - control.flops_per_sample
    if parameters == 0 and flops == 0:
        return "none, the network did not grow"
    return (
        f"{parameters:+,} parameters ({numbers.change(grown.parameters, control.parameters)}), "
        f"{'+' if flops >= 0 else ''}{numbers.flops(flops)} per sample "
        f"({numbers.change(grown.flops_per_sample, control.flops_per_sample)})"
    )
