"""Keys of a job's options are text, and to find out costs no more than to walk through them."""

from __future__ import annotations

import tracemalloc

import pytest

from esperd.daemon.admission import check_keys
from esperd.errors import InvalidJob
from esperd.messages.jobs import Budget, Job


def job(**host_options):
    return Job(host="cnn", data="digits", workdir="/", budget=Budget(epochs=1), host_options=host_options)


@pytest.mark.parametrize(
    ("options", "place"),
    [({"a": {1: 2}}, "host_options.a"), ({"a": [0, {"b": ({None: 1},)}]}, "host_options.a.1.b.0")],
)
def test_a_key_that_is_no_text_is_refused_by_its_place(options, place):
    with pytest.raises(InvalidJob, match="keys of options are text") as refused:
        check_keys(job(**options))
    assert refused.value.fields["key"] == place


def test_neither_long_keys_nor_many_values_cost_memory():
    broad = {"k" * 100_000: [[0]] * 20_000, "deep": [{}] * 20_000}
    made = job(**broad)
    tracemalloc.start()
    try:
        check_keys(made)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000, "the paths alone would be 2 GB"
