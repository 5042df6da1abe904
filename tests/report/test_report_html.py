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
from synthetic_job import ATTRIBUTION, JOB, REPORT, RICH_REPORT, SAMPLED

from esperd.errors import MissingExtra
from esperd.messages.growth import Stage
from esperd.messages.policy import Decision
from esperd.messages.telemetry import DecisionMade, EpochCompleted
from esperd.report import numbers
from esperd.report.history import Span, history_of
from esperd.report.html import render_html, write_html
from esperd.report.plots import draw_plots

EVENTS = synthetic_job.events()
RICH_EVENTS = synthetic_job.numbered(synthetic_job.rich_bodies())


@functools.cache
def page():
    return render_html(REPORT, EVENTS, JOB)


@functools.cache
def rich_page():
    return render_html(RICH_REPORT, RICH_EVENTS, JOB)


def with_attribution(attribution):
    return msgspec.structs.replace(RICH_REPORT, attribution=attribution)


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


@pytest.mark.parametrize("made", [page, rich_page])
def test_the_page_loads_nothing_from_anywhere(made):
    text = made()
    tags = Tags(text).found
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "image", "object"}
    for _, attributes in tags:
        for name, value in attributes.items():
            assert name != "src"
            if name.endswith("href"):
                assert value.startswith("#")
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


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
    plots = draw_plots(history_of(RICH_EVENTS), RICH_REPORT)
    assert set(plots) == {"training", "equal_flops", "alpha", "parameters", "contributions", "attribution", "flops"}
    identifiers = [element.get("id") for svg in plots.values() for element in ET.fromstring(svg).iter() if element.get("id")]
    assert len(identifiers) == len(set(identifiers))


@pytest.mark.parametrize("made", [page, rich_page])
def test_colours_of_plots_follow_the_page(made):
    text = made()
    assert "var(--grown)" in text
    assert "var(--stage-fossilized)" in text
    assert "#fe" not in text.split("</style>")[1].lower()
    defined = set(re.findall(r"(--[a-z0-9-]+):", text))
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", text)) <= defined
    assert "prefers-color-scheme: dark" in text


def test_the_page_says_what_the_seeds_brought_and_what_was_taken_back():
    for told in (
        "+0.0108 [+0.0047, +0.0169]",
        "A trial does not: it compares with a twin",
        "-0.0049 [-0.0159, +0.0061]",
        "by how much each kept seed lowers the gate loss, 95% intervals",
        "these overstate what the seeds brought",
        "multiply",
        "the training loss 5.31 stands above its limit of 0.412 &lt;twice&gt;",
        "rolled back to epoch 16",
        "learning rate cut to 0.5 of its schedule",
        "Screenings (3)",
        "goes on",
    ):
        assert told in rich_page()


def test_interactions_of_three_seeds_or_more_are_a_matrix_coloured_by_sign_and_strength():
    text = rich_page()
    assert text.count('class="right disturbs" style="--strength: 100%">-0.0467<') == 2
    assert text.count('class="right helps" style="--strength: 45%">+0.0212<') == 2
    pair = msgspec.structs.replace(ATTRIBUTION, seeds=ATTRIBUTION.seeds[:2], interactions=ATTRIBUTION.interactions[:1])
    text = render_html(with_attribution(pair), RICH_EVENTS)
    assert 'class="matrix"' not in text
    assert "+0.0212" in text


def test_what_was_not_attributed_is_on_the_page_with_the_reason():
    text = render_html(with_attribution(SAMPLED), RICH_EVENTS)
    Tags(text)
    assert "+0.0781, error unknown" in text
    assert "features.7#4 alone; features.3#1 with features.7#4" in text
    assert "Shapley value, ± standard error" in text
    assert numbers.UNKNOWN in text.partition('class="matrix"')[2].partition("</table>")[0]


def test_an_attribution_to_one_seed_needs_no_picture_and_one_without_any_number_none_either():
    one = msgspec.structs.replace(ATTRIBUTION, seeds=ATTRIBUTION.seeds[:1], interactions=())
    assert "attribution" not in draw_plots(history_of(RICH_EVENTS), with_attribution(one))
    nothing = tuple(
        msgspec.structs.replace(seed, leave_one_out=None, solo=None, shapley=None, shapley_error=None)
        for seed in ATTRIBUTION.seeds
    )
    unknown = msgspec.structs.replace(
        ATTRIBUTION,
        seeds=nothing,
        interactions=(),
        exact=None,
        loss_all_on=None,
        loss_all_off=None,
        not_measured=("loss with all on: the FLOPs cap",),
    )
    assert "attribution" not in draw_plots(history_of(RICH_EVENTS), with_attribution(unknown))
    Tags(render_html(with_attribution(unknown), RICH_EVENTS))


def test_names_of_attributed_seeds_are_escaped():
    hostile = "<b>&"
    seeds = (msgspec.structs.replace(ATTRIBUTION.seeds[0], seed=hostile), *ATTRIBUTION.seeds[1:])
    pairs = (msgspec.structs.replace(ATTRIBUTION.interactions[0], first=hostile), *ATTRIBUTION.interactions[1:])
    text = render_html(with_attribution(msgspec.structs.replace(ATTRIBUTION, seeds=seeds, interactions=pairs)), RICH_EVENTS)
    Tags(text)
    assert "&lt;b&gt;&amp;" in text
    assert hostile not in text


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
    assert "m:f on the gate split<" in render_html(msgspec.structs.replace(REPORT, metric_name="m:f"), events)


def test_shares_are_drawn_in_percent():
    for name in ("accuracy", "token_accuracy"):
        assert f"{name} on the gate split, %" in render_html(msgspec.structs.replace(REPORT, metric_name=name), EVENTS)


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


def test_epochs_that_a_rollback_took_back_count_once_as_they_were_trained_again():
    history = history_of(RICH_EVENTS)
    assert history.growth == history_of(EVENTS).growth
    assert history.rollbacks == (synthetic_job.ROLLED_BACK,)
    assert synthetic_job.ROLLED_BACK in history.turns


def test_epochs_that_were_taken_back_and_never_trained_again_do_not_count():
    cut = next(event.sequence for event in RICH_EVENTS if event.body == synthetic_job.ROLLED_BACK)
    history = history_of(RICH_EVENTS[:cut])
    assert history.growth[-1].epoch == synthetic_job.ROLLED_BACK.to_epoch
    assert max(each.epoch for seed in history.seeds for each in seed.contributions) == 16
    assert 17 in [event.body.epoch for event in RICH_EVENTS[:cut] if isinstance(event.body, EpochCompleted)]


def test_a_rollback_of_the_control_takes_back_its_own_epochs_only():
    back = msgspec.structs.replace(synthetic_job.ROLLED_BACK, epoch=9, to_epoch=4)
    history = history_of(synthetic_job.numbered([event.body for event in EVENTS[:-1]] + [back]))
    assert history.growth == history_of(EVENTS).growth
    assert [epoch.epoch for epoch in history.control] == [1, 2, 3, 4]
    assert history.rollbacks == ()


def test_trials_are_part_of_a_seeds_history():
    first, *others = history_of(RICH_EVENTS).seeds
    assert [trial.epoch for trial in first.trials] == [13]
    assert not any(seed.trials for seed in others)
    assert "features.3#1, trial" in rich_page()


def test_candidates_that_were_screened_out_are_in_no_plot():
    def screening(event):
        if not isinstance(event.body, EpochCompleted):
            return event
        seeds = tuple(
            msgspec.structs.replace(seed, screening="point 7" if seed.seed == "features.7#2" or event.body.epoch < 5 else "")
            for seed in event.body.seeds
        )
        return msgspec.structs.replace(event, body=msgspec.structs.replace(event.body, seeds=seeds))

    assert [seed.seed for seed in history_of(map(screening, EVENTS)).seeds] == ["features.3#1", "features.7#1"]
