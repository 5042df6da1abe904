"""The dashboard asks for metrics and labels that are documented, for all of them, and is what Grafana can load."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
DASHBOARD = json.loads((DOCS / "grafana.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
BUILT_IN = {"__rate_interval", "__range", "__all"}
GIVEN_BY_PROMETHEUS = {"instance", "le"}


def documented():
    """Labels of each metric, and whether it is a histogram."""
    text = (DOCS / "telemetry.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(esperd_\w+)` \|([^|]*)\| (.*) \|$", text, flags=re.MULTILINE)
    return {name: (set(re.findall(r"`(\w+)`", labels)), meaning.startswith("histogram")) for name, labels, meaning in rows}


METRICS = documented()
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_the_dashboard_shows_every_documented_metric_and_no_other():
    asked = {re.sub(r"_bucket$", "", name) for text in EXPRESSIONS for name in re.findall(r"\besperd_\w+", text)}
    assert asked == METRICS.keys()


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_an_expression_uses_labels_that_its_metric_has_and_treats_it_as_what_it_is(text):
    (name,) = re.findall(r"\besperd_\w+", text)
    labels, is_histogram = METRICS[name.removesuffix("_bucket")]
    used = {label for group in re.findall(r"by \(([^)]*)\)", text) for label in re.findall(r"\w+", group)}
    used |= set(re.findall(r"(\w+)=~?\"", text))
    assert used <= labels | GIVEN_BY_PROMETHEUS
    assert name.endswith("_bucket") == is_histogram == ("histogram_quantile(" in text) == ("le" in used)
    assert (name.endswith("_total") or is_histogram) == bool(re.search(r"\b(rate|increase)\(", text))
    assert text.count("(") == text.count(")")
    assert set(re.findall(r"\$(\w+)", text)) <= VARIABLES.keys() | BUILT_IN


def test_legends_name_labels_that_the_expression_keeps():
    for target in (target for panel in PANELS for target in panel["targets"]):
        kept = {label for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in re.findall(r"\w+", group)}
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept, target["expr"]


def test_grafana_finds_what_it_needs():
    assert isinstance(DASHBOARD["schemaVersion"], int)
    assert DASHBOARD["schemaVersion"] >= 36
    assert DASHBOARD["title"]
    assert DASHBOARD["uid"]
    assert DASHBOARD.get("id") is None, "that of one installation"
    assert (VARIABLES["datasource"]["type"], VARIABLES["datasource"]["query"]) == ("datasource", "prometheus")
    assert VARIABLES["instance"]["datasource"] == SOURCE
    (asked,) = re.findall(r"esperd_\w+", VARIABLES["instance"]["query"]["query"])
    assert METRICS[asked] == (set(), False), "there from the start, whatever happened"
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in PANELS:
        assert panel["title"]
        assert panel["datasource"] == SOURCE
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        assert all(target["datasource"] == SOURCE for target in panel["targets"])


def test_panels_lie_beside_each_other():
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    for one, other in itertools.combinations(places, 2):
        across = one["x"] < other["x"] + other["w"] and other["x"] < one["x"] + one["w"]
        down = one["y"] < other["y"] + other["h"] and other["y"] < one["y"] + one["h"]
        assert not (across and down)
