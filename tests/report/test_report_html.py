from __future__ import annotations

import builtins
import functools
import html.parser
import re
import sys
import xml.etree.ElementTree as ET

import msgspec
import pytest
import synthetic_job
from synthetic_job import JOB, REPORT

from esperd.errors import MissingExtra
from esperd.messages.growth import Stage
from esperd.messages.policy import Decision
from esperd.messages.telemetry import DecisionMade, EpochCompleted
from esperd.report.history import Span, history_of
from esperd.report.html import render_html, write_html
from esperd.report.plots import draw_plots

EVENTS = synthetic_job.events()


@functools.cache
def page():
    return render_html(REPORT, EVENTS, JOB)


class Tags(html.parser.HTMLParser):
    """Every start tag with its attributes; unbalanced tags are an error."""

    VOID = frozenset({"meta", "br", "path", "use", "rect"})

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.open = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_loads_nothing_from_anywhere():
    tags = Tags(page()).found
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "image", "object"}
    for _, attributes in tags:
        for name, value in attributes.items():
            assert name != "src"
            if name.endswith("href"):
                assert value.startswith("#")
    assert "@import" not in page()
    assert not re.search(r"url\((?!#)", page())


def test_text_from_outside_is_escaped():
    assert "<script>alert(1)</script>" not in page()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page()
    assert "<title>digits &lt;demo&gt;: grown by esperd</title>" in page()
    assert "rent 0.0124 &amp; nothing better" in page()


def test_names_that_look_like_mathematics_or_markup_are_drawn_as_they_are():
    hostile = "a$x_1$<b>&"
    seeds = [
        msgspec.structs.replace(event, body=msgspec.structs.replace(event.body, seeds=tuple(
            msgspec.structs.replace(seed, seed=hostile) for seed in event.body.seeds[:1])))
        if isinstance(event.body, EpochCompleted) else event
        for event in EVENTS
    ]  # fmt: skip
    text = render_html(REPORT, seeds)
    Tags(text)
    assert "a$x_1$&lt;b&gt;&amp;" in text
    assert hostile not in text


def test_every_plot_is_well_formed_and_its_identifiers_are_unique_on_the_page():
    plots = draw_plots(history_of(EVENTS), REPORT.flops, "accuracy")
    assert set(plots) == {"training", "equal_flops", "alpha", "parameters", "contributions", "flops"}
    identifiers = [element.get("id") for svg in plots.values() for element in ET.fromstring(svg).iter() if element.get("id")]
    assert len(identifiers) == len(set(identifiers))


def test_colours_of_plots_follow_the_page():
    assert "var(--grown)" in page()
    assert "var(--stage-fossilized)" in page()
    assert "#fe" not in page().split("</style>")[1].lower()
    defined = set(re.findall(r"(--[a-z0-9-]+):", page()))
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", page())) <= defined
    assert "prefers-color-scheme: dark" in page()


def test_the_page_says_what_a_reader_looks_for():
    for told in (
        "Growth paid",
        "+1.11 points of accuracy [+0.12, +2.23]",
        "+2,368 parameters (+24.0 %)",
        "contribution interval [-0.0041, +0.0032] holds 0 after 3 measurements",
        "refused: G1: shape changed to (32, 4, 3)",
        "decline bottleneck at features.3",
        "359 samples of the audit split",
        "epochs = 24",
        "training FLOPs by purpose",
        "policy unavailable",
    ):
        assert told in page()


def test_a_wait_repeated_for_the_same_reason_is_one_row_over_its_epochs():
    wait = Decision(action="wait", reason="2 seeds live already")
    other = Decision(action="wait", reason="too late")
    made = [DecisionMade(epoch=epoch, decision=wait if epoch < 7 else other, applied=True) for epoch in range(4, 9)]
    text = render_html(REPORT, synthetic_job.numbered(made))
    assert text.count("2 seeds live already") == 1
    assert ">4-6<" in text
    assert ">7-8<" in text


def test_the_same_report_gives_the_same_page():
    assert render_html(REPORT, EVENTS, JOB) == page()


def test_a_report_without_events_seeds_or_control_is_still_a_page():
    bare = msgspec.structs.replace(
        REPORT, control=None, comparison=None, seeds=(), refused=(), flops={}, metric_name=None, resumed=2
    )
    text = render_html(bare, [])
    Tags(text)
    assert "Not known" in text
    assert "no seed was germinated" in text
    assert "resumed 2 times" in text
    assert "<svg" not in text


def test_losses_below_zero_and_a_metric_of_its_own_are_drawn():
    events = [
        msgspec.structs.replace(event, body=msgspec.structs.replace(event.body, gate_loss=-1.0 + event.body.epoch / 9))
        if isinstance(event.body, EpochCompleted)
        else event
        for event in EVENTS
    ]
    assert "m:f on the gate split" in render_html(msgspec.structs.replace(REPORT, metric_name="m:f"), events)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtra, match=r'pip install "esperd\[report\]"'):
        render_html(REPORT, EVENTS)


def test_drawing_leaves_matplotlib_settings_and_pyplot_alone():
    import matplotlib as mpl

    before = {name: mpl.rcParams[name] for name in ("font.size", "svg.fonttype", "text.parse_math")}
    render_html(REPORT, EVENTS)
    assert {name: mpl.rcParams[name] for name in before} == before
    assert "matplotlib.pyplot" not in sys.modules


def test_a_page_is_written_with_its_folder(tmp_path):
    target = tmp_path / "new" / "report.html"
    write_html(target, REPORT, EVENTS, JOB)
    assert target.read_text() == page()


def test_stages_become_spans_and_repeated_epochs_count_once():
    again = [event for event in EVENTS if isinstance(event.body, EpochCompleted) and event.body.epoch in (5, 6)]
    history = history_of([*EVENTS, *again])
    assert [epoch.epoch for epoch in history.growth] == list(range(1, synthetic_job.EPOCHS + 1))
    first = history.seeds[0]
    assert first.spans[0] == Span(Stage.TRAINING, 3, 5)
    assert first.spans[-1] == Span(Stage.FOSSILIZED, 14, 24)
    assert [contribution.epoch for contribution in first.contributions] == list(range(6, 25))
