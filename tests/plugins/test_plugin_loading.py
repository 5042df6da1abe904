"""Every extension point, through the same door the built-ins use; and what becomes of a plugin that is broken."""

from __future__ import annotations

import sys
import textwrap
import types

import pytest

from esperd.declarations import AlphaSchedule, Blueprint, Dataset, Gate, Host, Strategy, SurgeryOperation, Trigger
from esperd.errors import UnknownName
from esperd.hookspecs import hookimpl
from esperd.messages.jobs import Budget, Job, JobInfo, JobState
from esperd.messages.policy import Decision
from esperd.messages.telemetry import DecisionMade, StageChanged
from esperd.plugins import BUILTIN_PLUGINS, Plugins, load_plugins

BLUEPRINT = Blueprint(
    name="mine",
    topology="cnn",
    factory="nowhere:mine",
    parameters=lambda shape: 0,
    flops=lambda shape: 0.0,
    description="",
    source="",
)
JOB = JobInfo(
    id="j1",
    name="",
    state=JobState.RUNNING,
    attempt=1,
    submitted_at=0.0,
    job=Job(host="cnn", data="digits", budget=Budget(epochs=1)),
)


def plugin(name="mine", **hooks):
    module = types.ModuleType(name)
    for hook, function in hooks.items():
        setattr(module, hook, hookimpl(function, specname=hook))
    return module


def loaded(**hooks):
    plugins = Plugins()
    plugins.add("mine", plugin(**hooks), "mine 1.0")
    return plugins


def registers(hook, declaration):
    """The declaration is found by its name, and the plugin's record and package are those it came from."""
    kind = hook.removeprefix("esperd_")
    plugins = loaded(**{hook: lambda: (found for found in [declaration])})
    (record,) = plugins.records()
    return (
        getattr(plugins, kind)["mine"] is declaration
        and record.registered == {kind: ["mine"]}
        and record.error is None
        and plugins.distribution_of(kind, "mine") == "mine 1.0"
    )


def test_hook_esperd_blueprints():
    assert registers("esperd_blueprints", BLUEPRINT)


def test_hook_esperd_strategies():
    assert registers("esperd_strategies", Strategy(name="mine", decide="nowhere:decide", description=""))


def test_hook_esperd_triggers():
    assert registers("esperd_triggers", Trigger(name="mine", fires="nowhere:fires", description=""))


def test_hook_esperd_gates():
    assert registers("esperd_gates", Gate(name="mine", guards="training", check="nowhere:check", description=""))


def test_hook_esperd_surgery_operations():
    assert registers("esperd_surgery_operations", SurgeryOperation(name="mine", apply="nowhere:apply", description=""))


def test_hook_esperd_hosts():
    assert registers("esperd_hosts", Host(name="mine", factory="nowhere:build", description=""))


def test_hook_esperd_datasets():
    assert registers("esperd_datasets", Dataset(name="mine", loader="nowhere:load", description=""))


def test_hook_esperd_alpha_schedules():
    assert registers("esperd_alpha_schedules", AlphaSchedule(name="mine", curve="nowhere:curve", description=""))


def observed(hook, **arguments):
    """What an observer of one hook is given; it may take fewer arguments than are offered."""
    seen = []
    last = list(arguments)[-1]
    namespace = {"seen": seen}
    exec(f"def everything({', '.join(arguments)}): seen.append(({', '.join(arguments)},))", namespace)
    exec(f"def one({last}): seen.append({last})", namespace)
    plugins = Plugins()
    plugins.add("everything", plugin("everything", **{hook: namespace["everything"]}))
    plugins.add("one", plugin("one", **{hook: namespace["one"]}))
    plugins.notify(hook, **arguments)
    expected = [tuple(arguments.values()), arguments[last]]
    return sorted(map(repr, seen)) == sorted(map(repr, expected)) and all(not record.error for record in plugins.records())


def test_hook_esperd_job_started():
    assert observed("esperd_job_started", job=JOB)


def test_hook_esperd_job_finished():
    assert observed("esperd_job_finished", job=JOB)


def test_hook_esperd_decision():
    decision = DecisionMade(epoch=1, decision=Decision(action="wait", reason="early"), applied=True)
    assert observed("esperd_decision", job="j1", decision=decision)


def test_hook_esperd_stage_changed():
    change = StageChanged(
        epoch=1, seed="s1", slot="body", blueprint="norm", before="dormant", after="germinated", reason="asked for"
    )
    assert observed("esperd_stage_changed", job="j1", change=change)


def fails(error):
    def hook():
        raise error

    return hook


@pytest.mark.parametrize(
    ("hooks", "told"),
    [
        ({"esperd_blueprints": fails(ZeroDivisionError("one over none"))}, "ZeroDivisionError: one over none"),
        ({"esperd_blueprints": fails(SystemExit("not here"))}, "SystemExit: not here"),
        ({"esperd_blueprints": lambda: 3}, "'int' object is not iterable"),
        ({"esperd_blueprints": lambda: ["mine"]}, "esperd_blueprints must return Blueprints, got 'mine'"),
        ({"esperd_hosts": lambda: [BLUEPRINT]}, "esperd_hosts must return Hosts, got Blueprint"),
        ({"esperd_blueprints": lambda: [BLUEPRINT, BLUEPRINT]}, "the name 'mine' is already taken among blueprints"),
        ({"esperd_hosts": lambda: [Host(name=7, factory="", description="")]}, "a name must be a string"),
        ({"esperd_blueprint": lambda: None}, "unknown hook 'esperd_blueprint'"),
        ({"esperd_blueprints": lambda shape: []}, "shape"),
    ],
    ids=["raises", "exits", "no list", "a string", "another kind", "twice", "no name", "unknown hook", "unknown argument"],
)
def test_a_broken_plugin_is_listed_with_its_traceback_and_registers_nothing(hooks, told):
    good = Host(name="good", factory="nowhere:build", description="")
    plugins = Plugins()
    plugins.add(
        "broken", plugin("broken", **{"esperd_datasets": lambda: [Dataset(name="d", loader="", description="")], **hooks})
    )
    plugins.add("good", plugin("good", esperd_hosts=lambda: [good]))
    broken, well = plugins.records()
    assert broken.error is not None
    assert broken.error.startswith("Traceback")
    assert told in broken.error
    assert broken.registered == {}
    assert list(plugins.datasets) == []
    assert well.error is None
    assert dict(plugins.hosts) == {"good": good}


def test_a_name_that_is_taken_stays_with_the_first():
    plugins = Plugins()
    mine = Host(name="mine", factory="nowhere:first", description="")
    plugins.add("first", plugin("first", esperd_hosts=lambda: [mine]))
    plugins.add("second", plugin("second", esperd_hosts=lambda: [Host(name="mine", factory="nowhere:second", description="")]))
    assert plugins.hosts["mine"] is mine
    assert "the name 'mine' is already taken among hosts" in plugins.records()[1].error


def test_two_plugins_of_one_name_leave_the_first_as_it_was():
    seen = []
    plugins = Plugins()
    plugins.add("twin", plugin("first", esperd_job_started=lambda job: seen.append(job.id)))
    plugins.add("twin", plugin("second"))
    plugins.notify("esperd_job_started", job=JOB)
    first, second = plugins.records()
    assert seen == ["j1"]
    assert first.error is None
    assert "twin" in second.error


@pytest.mark.parametrize("error", [ZeroDivisionError("one over none"), SystemExit("enough")])
def test_an_observer_that_raises_is_listed_and_the_others_still_hear(error):
    seen = []

    def raises(job):
        raise error

    plugins = Plugins()
    plugins.add("before", plugin("before", esperd_job_started=lambda job: seen.append("before")))
    plugins.add("broken", plugin("broken", esperd_job_started=raises))
    plugins.add("after", plugin("after", esperd_job_started=lambda job: seen.append("after")))
    plugins.notify("esperd_job_started", job=JOB)
    assert sorted(seen) == ["after", "before"]
    before, broken, after = plugins.records()
    assert str(error) in broken.error
    assert before.error is None
    assert after.error is None


def test_an_installed_plugin_that_does_not_import_is_listed_and_a_blocked_one_is_not_touched(tmp_path, monkeypatch):
    for name in ("broken-one", "blocked-one"):
        module = name.replace("-", "_")
        (tmp_path / f"{module}.py").write_text("import a_module_that_is_not_there\n")
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[esperd]\n{name} = {module}\n")
    monkeypatch.syspath_prepend(tmp_path)
    records = {record.name: record for record in load_plugins(blocked=["blocked-one"]).records()}
    assert "blocked-one" not in records
    assert "blocked_one" not in sys.modules
    assert records["broken-one"].distribution == "broken-one 1.0"
    assert "No module named 'a_module_that_is_not_there'" in records["broken-one"].error


def test_what_is_built_in_comes_through_the_same_door():
    plugins = load_plugins()
    records = {record.name: record for record in plugins.records()}
    for name in BUILTIN_PLUGINS:
        record = records[name.removeprefix("esperd.")]
        assert record.error is None
        assert record.distribution is None
        assert record.registered


def test_an_unknown_name_is_an_error_that_lists_what_exists():
    plugins = loaded(esperd_blueprints=lambda: [BLUEPRINT])
    with pytest.raises(UnknownName, match="no blueprint is called 'yours'; there are: mine"):
        plugins.blueprints["yours"]
    with pytest.raises(UnknownName, match="no blueprint is called 'no"):
        plugins.blueprints.matching(["m*", "no*"])


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        ("strategies", "ucbb", "no strategy is called 'ucbb'; did you mean 'ucb'? (there are: "),
        ("alpha_schedules", "cosin", "no alpha schedule is called 'cosin'; did you mean 'cosine'? (there are: "),
        ("surgery_operations", "amputate", "no surgery operation is called 'amputate'; there are: "),
        ("blueprints", "conv_ligth", "no blueprint is called 'conv_ligth'; did you mean 'conv_light'? (there are: "),
    ],
)
def test_an_unknown_name_is_told_in_the_singular_with_the_nearest_that_exists(kind, name, told):
    with pytest.raises(UnknownName) as caught:
        getattr(load_plugins(), kind)[name]
    assert caught.value.message.startswith(told)


def test_patterns_choose_in_order_and_once():
    names = ["norm", "conv_light", "conv_heavy"]
    entries = [Host(name=name, factory="", description="") for name in names]
    hosts = loaded(esperd_hosts=lambda: entries).hosts
    assert [host.name for host in hosts.matching([])] == names
    assert [host.name for host in hosts.matching(["conv_*", "*"])] == ["conv_light", "conv_heavy", "norm"]
    assert len(hosts) == 3
    assert "norm" in hosts


def test_something_that_is_no_kind_is_no_attribute():
    with pytest.raises(AttributeError, match="codenames"):
        _ = Plugins().codenames


def test_the_traceback_shows_the_plugins_own_line():
    namespace = {}
    source = textwrap.dedent(
        """
        def esperd_hosts():
            return [].pop()
        """
    )
    exec(compile(source, "their_plugin.py", "exec"), namespace)
    (record,) = loaded(esperd_hosts=namespace["esperd_hosts"]).records()
    assert 'File "their_plugin.py", line 3, in esperd_hosts' in record.error
    assert "IndexError: pop from empty list" in record.error
