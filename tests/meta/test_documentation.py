"""What a person can name is documented where it belongs, tested, and true: hooks, configuration, metrics, errors, commands."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import click
import job_reference
import msgspec
import pytest

import esperd
from esperd import errors, hookspecs
from esperd.builtins.blueprints import BLUEPRINTS
from esperd.builtins.strategies import STRATEGIES
from esperd.cli.client import esper
from esperd.cli.daemon import esperd as esperd_command
from esperd.config import Config, load_config
from esperd.declarations import OPEN_DIMENSIONS, TOPOLOGY_SHAPES
from esperd.growth.contract import SHAPES
from esperd.messages.control import ActorList
from esperd.messages.telemetry import Body
from esperd.telemetry.metrics import Metrics

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TESTS = {
    file: file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("*.py") if file.parent != Path(__file__).parent
}
SOURCE = {file: ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / "esperd").rglob("*.py")}
HOOKS = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("esperd_")}
ERRORS = [errors.EsperError, *errors.EsperError.__subclasses__()]


def document(name):
    return (DOCS / name).read_text(encoding="utf-8")


def rows(text):
    """Cells of every row of every table."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


BLUEPRINT_ROWS = [row for row in rows(document("growth.md")) if len(row) == 5 and row[1] in TOPOLOGY_SHAPES]


# --- plugins ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_documented_with_its_exact_signature(name):
    signature = f"{name}{inspect.signature(HOOKS[name])}".replace("'", "")
    assert f"| `{signature}` |" in document("plugins.md")


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_has_a_test_of_its_own_and_says_what_it_is_for(name):
    assert any(f"def test_hook_{name}(" in text for text in TESTS.values())
    assert HOOKS[name].__doc__


def test_no_hook_is_documented_that_does_not_exist():
    assert set(re.findall(r"`(esperd_\w+)\(", document("plugins.md"))) == set(HOOKS)


def test_every_check_of_a_blueprint_is_documented():
    made = set(re.findall(r'check\("(\w+)"', (ROOT / "esperd/growth/contract.py").read_text(encoding="utf-8")))
    assert made
    assert made <= set(re.findall(r"`(\w+)`", document("plugins.md")))


def test_the_table_of_topologies_is_what_the_contract_and_the_exporter_do():
    table = {row[0].strip("`"): row[1:] for row in rows(document("plugins.md")) if row[0].strip("`") in TOPOLOGY_SHAPES}
    assert table.keys() == TOPOLOGY_SHAPES.keys()
    for topology, (shape, checked, left_open) in table.items():
        assert shape == f"`{TOPOLOGY_SHAPES[topology]}`"
        assert checked == ", ".join(map(str, SHAPES[topology]))
        assert left_open.startswith("the batch and T" if 1 in OPEN_DIMENSIONS[topology] else "the batch")


def test_every_built_in_blueprint_is_documented_and_no_other():
    assert [row[0].strip("`") for row in BLUEPRINT_ROWS] == [blueprint.name for blueprint in BLUEPRINTS]


@pytest.mark.parametrize("blueprint", BLUEPRINTS, ids=lambda blueprint: blueprint.name)
def test_a_blueprint_is_documented_with_its_true_formula_and_source(blueprint):
    (row,) = [row for row in BLUEPRINT_ROWS if row[0] == f"`{blueprint.name}`"]
    assert row[1] == blueprint.topology
    sizes = re.findall("[A-Z]", TOPOLOGY_SHAPES[blueprint.topology])
    for shape in [(1, 3, 5), (8, 16, 7), (17, 33, 2), (96, 128, 4)]:
        names = {**dict(zip(sizes, shape, strict=False)), "max": max, "min": min, "__builtins__": {}}
        assert eval(row[3].strip("`"), names) == blueprint.parameters(shape[: len(sizes)])
    assert set(re.findall(r"arXiv:[\d.]+\d", row[4])) == set(re.findall(r"arXiv:[\d.]+\d", blueprint.source))


STRATEGY_ROWS = {row[0].partition(" ")[0].strip("`"): row for row in rows(document("policy.md").partition("\n## ")[0])[2:]}


def test_every_built_in_strategy_is_documented_and_no_other():
    assert list(STRATEGY_ROWS) == [strategy.name for strategy in STRATEGIES]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
def test_a_strategy_is_documented_with_the_keys_that_it_reads(strategy):
    module = importlib.import_module(strategy.decide.partition(":")[0])
    read = set(re.findall(r"settings\.(\w+)", inspect.getsource(module)))
    assert read == set(re.findall(r"`(\w+)`", STRATEGY_ROWS[strategy.name][2]))


# --- configuration and jobs ------------------------------------------------------------------------------------------------


def test_esperd_toml_holds_every_key_with_its_default():
    assert load_config(ROOT / "esperd.toml", {}) == Config()
    assert tomllib.loads((ROOT / "esperd.toml").read_text(encoding="utf-8")).keys() == msgspec.to_builtins(Config()).keys()


@pytest.mark.parametrize(
    ("section", "key"), [(section, key) for section, table in msgspec.to_builtins(Config()).items() for key in table]
)
def test_every_key_of_the_configuration_is_explained_in_esperd_toml(section, key):
    table = (ROOT / "esperd.toml").read_text(encoding="utf-8").partition(f"\n[{section}]\n")[2].partition("\n[")[0]
    lines = table.splitlines()
    (place,) = [number for number, line in enumerate(lines) if line.startswith(f"{key} = ")]
    comments = [line for line in lines if line.startswith("# ")]
    assert (place > 0 and lines[place - 1].startswith("# ")) or any(key in comment for comment in comments)


def test_docs_job_md_is_what_the_structs_say():
    told = "run: python tests/meta/job_reference.py"
    assert document("job.md") == job_reference.reference(), told


def test_every_key_of_a_job_says_what_it_means():
    silent = [row for row in rows(document("job.md")) if not row[-1]]
    assert not silent
    keys = {row[0].strip("`") for row in rows(document("job.md"))}
    assert {key.rpartition(".")[2] for key in job_reference.every_key()} <= keys


# --- telemetry -------------------------------------------------------------------------------------------------------------


def metric_names():
    metrics = Metrics()
    metrics.observe_actors(ActorList(actors=(), dead_letters={}))
    names = re.findall(r"^# TYPE (\w+)", metrics.render().decode(), flags=re.MULTILINE)
    return {name for name in names if not name.endswith("_created")}


def test_every_metric_is_documented_and_no_other():
    assert {row[0].strip("`") for row in rows(document("telemetry.md")) if row[0].startswith("`esperd_")} == metric_names()


def test_every_event_is_documented_and_no_other():
    events = {kind.__name__ for kind in get_args(Body)}
    assert {row[0].strip("`") for row in rows(document("telemetry.md")) if re.match(r"`[A-Z]", row[0])} == events


@pytest.mark.parametrize("kind", get_args(Body))
def test_every_event_is_sent_by_somebody(kind):
    assert made_in(kind.__name__)


# --- errors ----------------------------------------------------------------------------------------------------------------


def made_in(name):
    """Modules in which a class is called, its own left out."""
    return [
        file
        for file, tree in SOURCE.items()
        if any(
            isinstance(node, ast.Call)
            and (node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)) == name
            for node in ast.walk(tree)
        )
    ]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.code)
def test_every_error_is_documented_with_its_exit_status(error):
    (row,) = [row for row in rows(document("errors.md")) if row[0] == f"`{error.code}`"]
    assert row[1] == str(error.exit_status)
    assert all(row)
    (told,) = [row for row in rows(document("cli.md")) if f"`{error.code}`" in row[-1] and row[0].isdigit()]
    assert told[0] == str(error.exit_status)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.code)
def test_every_error_is_raised_somewhere(error):
    assert [file for file in made_in(error.__name__) if file.name != "errors.py"]


def test_error_codes_are_unique_and_no_other_is_documented():
    assert len({error.code for error in ERRORS}) == len(ERRORS)
    documented = {row[0].strip("`") for row in rows(document("errors.md")) if row[0].startswith("`")}
    assert documented == {error.code for error in ERRORS}


# --- commands --------------------------------------------------------------------------------------------------------------


def commands(group, words):
    for name, command in group.commands.items():
        yield (*words, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))


COMMANDS = [
    pytest.param(words, command, id=" ".join(words))
    for program in (esper, esperd_command)
    for words, command in commands(program, (program.name,))
]


@pytest.mark.parametrize(("words", "command"), COMMANDS)
def test_every_command_is_documented_with_its_options(words, command):
    text = document("cli.md")
    (row,) = [row for row in rows(text) if row[0].startswith(f"`{' '.join(words)}`")]
    everywhere = {"--endpoint", "--server-key", "--client-key", "--json", "--no-color"}
    for option in (parameter for parameter in command.params if isinstance(parameter, click.Option)):
        (name,) = [name for name in option.opts if name.startswith("--")]
        assert name in everywhere or name in row[1] or name in text.partition(f"`{words[0]} {words[1]}`")[2]


@pytest.mark.parametrize(("words", "command"), COMMANDS)
def test_every_command_is_exercised(words, command):
    quoted = [f'"{word}"' for word in words[1:]]
    told = re.compile(r",\s*".join(quoted))
    assert any(told.search(text) for text in TESTS.values())


# --- names and links -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", esperd.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(esperd, name) is not None
    if name != "__version__":
        assert inspect.getdoc(getattr(esperd, name))


def test_a_name_that_is_not_public_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = esperd.Nothing


def test_importing_esperd_loads_nothing_of_it_until_a_name_is_used():
    code = "import sys, esperd; sys.exit(any(name.startswith(('esperd.', 'torch', 'zmq')) for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "file",
    [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted(ROOT.glob("plugins/*/README.md"))],
    ids=lambda file: file.name,
)
def test_links_lead_somewhere(file):
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", file.read_text(encoding="utf-8"))
    assert [link for link in links if not (file.parent / link).exists()] == []


REFERENCES = {found for file in DOCS.glob("*.md") for found in re.findall(r"`(esperd(?:\.\w+)+)`", file.read_text("utf-8"))}


@pytest.mark.parametrize("reference", sorted(REFERENCES - {"esperd.toml"}))
def test_names_in_the_documents_exist(reference):
    module, _, name = reference.rpartition(".")
    assert hasattr(importlib.import_module(module), name) or importlib.import_module(reference)


def test_every_promise_names_a_test_that_exists():
    rows = [row for row in (ROOT / "docs" / "promises.md").read_text().splitlines() if row.startswith("| ")]
    promises = [row for row in rows if not row.startswith("| promise")]
    assert len(promises) > 50
    for row in promises:
        named = re.findall(r"((?:tests|plugins|bench)/[\w/]+\.py)::(?:\w+::)*(\w+)", row)
        assert named, row
        for file, name in named:
            assert re.search(rf"(def|class) {name}\b|^{name} = ", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{name}"
