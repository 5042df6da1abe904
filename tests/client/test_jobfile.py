from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esperd.errors import InvalidJob
from esperd.jobfile import check_job, job_from, load_job, parse_job
from esperd.messages.jobs import Budget, Job, Optimizer

GOOD = """
host = "cnn"
data = "digits"
workdir = "models"

[budget]
epochs = 20
"""


def refusal(text: str) -> InvalidJob:
    with pytest.raises(InvalidJob) as caught:
        parse_job(text, Path("/somewhere"), origin="job.toml")
    return caught.value


def test_a_job_file_becomes_a_job_whose_workdir_is_relative_to_the_file(tmp_path):
    file = tmp_path / "job.toml"
    file.write_text(GOOD)
    job = load_job(file)
    assert job.host == "cnn"
    assert job.budget.epochs == 20
    assert job.workdir == str(tmp_path / "models")


def test_an_unknown_key_is_named_with_file_line_table_and_the_nearest_known_key():
    error = refusal(GOOD.replace("epochs = 20", "epohcs = 20"))
    assert error.message == (
        "job.toml, line 7: unknown key 'epohcs' in [budget]; did you mean 'epochs'? "
        "(known keys: epochs, flops, seconds, parameters, flops_per_sample)"
    )
    assert error.fields == {"file": "job.toml", "key": "budget.epohcs", "line": 7}
    assert error.exit_status == 2


def test_an_unknown_table_is_named_with_its_line():
    error = refusal(GOOD + "[optimiser]\nname = 'sgd'\n")
    assert error.message.startswith("job.toml, line 8: unknown key 'optimiser'; did you mean 'optimizer'?")


def test_an_unknown_key_of_the_policy_is_refused_too():
    assert "did you mean 'strategy'?" in refusal(GOOD + "[policy]\nstrateg = 'ucb'\n").message


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("epochs = 'ten'", "job.toml, line 7: budget.epochs: expected an integer, got 'ten'"),
        ("epochs = 0", "job.toml, line 7: budget.epochs: expected an integer >= 1, got 0"),
        ("epochs = 1.5", "job.toml, line 7: budget.epochs: expected an integer, got 1.5"),
        ("seconds = -3", "job.toml, line 7: budget.seconds: expected a number > 0.0, got -3"),
        ("seconds = nan", "job.toml, line 7: budget.seconds: expected a number > 0.0, got nan"),
        ("parameters = 9", "job.toml: [budget] sets no end: give at least one of epochs, flops, seconds"),
    ],
)
def test_a_wrong_budget_names_key_and_value(line, told):
    assert refusal(GOOD.replace("epochs = 20", line)).message == told


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [("budget", "flops", "inf"), ("gates", "min_contribution", "nan"), ("policy", "exploration", "inf")],
)
def test_a_number_that_is_not_finite_is_refused_with_its_line(tmp_path, table, key, value):
    text = 'host = "cnn"\ndata = "digits"\n' + ("" if table == "budget" else "[budget]\nepochs = 2\n")
    text += f"[{table}]\n{key} = {value}\n"
    line = text.count("\n")
    with pytest.raises(InvalidJob, match=rf"job.toml, line {line}: {table}\.{key}: expected a finite number, got {value}"):
        parse_job(text, tmp_path, origin="job.toml")


def test_a_choice_that_does_not_exist_lists_the_choices():
    error = refusal(GOOD + "[optimizer]\nname = 'adamax'\n")
    assert error.message == (
        "job.toml, line 9: optimizer.name: expected 'sgd', 'adam', 'adamw' or your own module:function, got 'adamax'"
    )


def test_a_wrong_element_of_a_list_is_named_with_its_index():
    error = refusal(GOOD + "[slots]\npatterns = ['features.*', 3]\n")
    assert error.message == "job.toml, line 9: slots.patterns[1]: expected a string, got 3"


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        (
            "[gates.topologies.cn]\nmin_gradient_ratio = 0.1\n",
            "line 8: unknown key 'cn' in [gates.topologies]; did you mean 'cnn'? (known keys: cnn, mlp, transformer)",
        ),
        (
            "[gates.topologies.mlp]\n[gates.topologies.cnn]\nmin_gradient_ratio = 'x'\n",
            "line 10: gates.topologies.cnn.min_gradient_ratio: expected a number, got 'x'",
        ),
        (
            "[gates.blueprints.norm]\nmin_gradient = 0.1\n",
            "line 9: unknown key 'min_gradient' in [gates.blueprints.norm]; did you mean 'min_gradient_ratio'? (known keys: ",
        ),
        (
            "[gates.topologies.cnn]\nmin_contribution = nan\n",
            "line 9: gates.topologies.cnn.min_contribution: expected a finite number, got nan",
        ),
        ("[gates.topologies]\ncnn = 3\n", "line 9: gates.topologies.cnn: expected a table, got 3"),
    ],
)
def test_thresholds_for_some_seeds_are_checked_as_strictly_as_any_table(tables, told):
    assert refusal(GOOD + tables).message.startswith(f"job.toml, {told}")


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        (
            "[optimizer]\nname = 'sgd'\nmomentum = 0.0\nnesterov = true\n",
            "line 11: optimizer.nesterov: needs momentum; set optimizer.momentum above 0, or nesterov = false",
        ),
        (
            "[optimizer]\nname = 'adam'\n[optimizer.options]\namsgrad = true\n",
            "line 10: optimizer.options: amsgrad: options are for an optimizer of your own, those of 'adam' are keys",
        ),
        (
            "[gates]\nproof = 'trial'\ntrial_epochs = 20.5\n",
            "line 10: gates.trial_epochs: a trial of 20.5 epochs is longer than the whole job, budget.epochs = 20; lower it",
        ),
        (
            "[policy]\nplateau_release = 0.005\n",
            "line 9: policy.plateau_release: 0.005 is below policy.plateau_improvement = 0.01",
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused_with_what_to_change(tables, told):
    error = refusal(GOOD + tables)
    assert error.message.startswith(f"job.toml, {told}")
    assert error.fields["key"] == told.split(": ")[1]


def test_values_that_only_look_like_a_contradiction_are_taken(tmp_path):
    for tables in (
        "[optimizer]\nname = 'sgd'\nnesterov = true\n",
        "[optimizer]\nname = 'mine:optimizer'\noptions = {amsgrad = true}\n",
        "[gates]\nproof = 'trial'\ntrial_epochs = 20.0\n",
        "[gates]\ntrial_epochs = 30.0\n",
        "[gates.topologies.cnn]\nmin_contribution = 0.1\n[gates.blueprints.'their own']\n",
    ):
        assert parse_job(GOOD + tables, tmp_path, origin="job.toml").budget.epochs == 20


def test_a_value_where_a_table_belongs_is_refused():
    assert refusal("budget = 3\nhost = 'a'\ndata = 'b'").message == "job.toml, line 1: budget: expected a table, got 3"


@pytest.mark.parametrize(("key", "hint"), [("host", 'host = "cnn"'), ("data", ".npz"), ("budget", "[budget] table")])
def test_a_missing_key_is_named_with_what_to_add(key, hint):
    text = {"host": "host = 'a'\n", "data": "data = 'b'\n", "budget": "[budget]\nepochs = 1\n"}
    error = refusal("".join(part for name, part in text.items() if name != key))
    assert f"the key '{key}' is missing at the top level" in error.message
    assert hint in error.message
    assert error.fields["key"] == key


def test_a_file_that_is_not_toml_is_refused_with_the_line(tmp_path):
    file = tmp_path / "broken.toml"
    file.write_text("host = \n")
    with pytest.raises(InvalidJob, match=r"broken\.toml is not TOML: .*line 1"):
        load_job(file)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    file = tmp_path / "binary.toml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidJob, match="is not UTF-8"):
        load_job(file)


def test_a_file_that_does_not_exist_is_refused_by_name(tmp_path):
    with pytest.raises(InvalidJob, match=r"cannot read .*absent\.toml: No such file"):
        load_job(tmp_path / "absent.toml")


def test_a_job_built_in_python_is_checked_as_strictly_as_a_file(tmp_path):
    job = Job(host="cnn", data="digits", budget=Budget(epochs=-1))
    with pytest.raises(InvalidJob, match=r"job: budget\.epochs: expected an integer >= 1, got -1"):
        check_job(job, tmp_path)
    with pytest.raises(InvalidJob, match="plain values only"):
        check_job(Job(host="cnn", data="digits", budget=Budget(epochs=1), host_options={"x": object()}), tmp_path)


def test_a_checked_job_keeps_everything_but_a_relative_workdir(tmp_path):
    job = Job(host="m:f", data="m:d", budget=Budget(epochs=3), optimizer=Optimizer(name="sgd"), host_options={"width": 8})
    assert check_job(job, tmp_path) == msgspec.structs.replace(job, workdir=str(tmp_path))


@given(st.text(min_size=1, max_size=30))
def test_whatever_the_unknown_key_is_called_it_is_named(key):
    known = {field.encode_name for field in msgspec.structs.fields(Budget)}
    if key in known:
        return
    with pytest.raises(InvalidJob) as caught:
        job_from({"host": "a", "data": "b", "budget": {"epochs": 1, key: 1}}, Path("/"))
    assert f"unknown key {key!r} in [budget]" in caught.value.message
