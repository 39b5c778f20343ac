"""Who may import whom: the order of the layers, and the two packages' one direction."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From bottom to top. A room imports from itself and from the rooms below it; rooms side by side do not know each other.
LAYERS = [
    {"errors", "version", "recipes"},
    {"system", "seeds", "algorithms", "profiling"},
    {"config", "schedules"},
    {"integrations", "policies", "run"},
    {"embedded", "reporting", "rollout"},
    {"distributed", "prompts", "rewards"},
    {"engines", "evaluation"},
    {"exporting", "training"},
    {"api", "planning"},
    {"cli"},
    {"__main__", ""},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules(package: Path) -> dict[str, Path]:
    """Every module of a package by its full name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """Every node of a module's syntax tree."""
    return list(ast.walk(ast.parse(path.read_text())))


def imports(name: str, path: Path) -> Iterator[str]:
    """Full names of what a module imports, inside functions and for a type checker alone, too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            # `from package import name` may import the module `name`.
            yield from (f"{source}.{alias.name}" for alias in node.names)


ENGINE = modules(ROOT / "loopfast")
KERNELS = modules(ROOT / "kernels" / "loopfast_kernels")


def layer(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_every_module_has_a_layer():
    assert {layer(name) for name in ENGINE} == set(LEVEL)


def imported_modules(name: str, path: Path, package: dict[str, Path]) -> set[str]:
    """The modules of a package that one of them imports; ``from module import name`` imports the module."""
    found = set()
    for target in imports(name, path):
        while target and target not in package:
            target = target.rpartition(".")[0]
        found |= {target} - {"", name}
    return found


GRAPH = {name: imported_modules(name, path, ENGINE) for name, path in ENGINE.items()}


@pytest.mark.parametrize("name", sorted(ENGINE))
def test_a_module_imports_from_its_room_and_those_below(name):
    for imported in GRAPH[name]:
        assert layer(imported) == layer(name) or LEVEL[layer(imported)] < LEVEL[layer(name)], (
            f"{name} imports {imported} from a layer that is not below its own"
        )


def circles(graph: dict[str, set[str]]) -> list[str]:
    """What is left of a graph when everything that leads to no circle is taken away."""
    left = {name: set(targets) for name, targets in graph.items()}
    while ends := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in ends:
            del left[name]
    return sorted(left)


def test_no_modules_import_each_other_in_a_circle():
    assert circles(GRAPH) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_the_kernels_stand_alone(name):
    for imported in imports(name, KERNELS[name]):
        root = imported.split(".")[0]
        if root == "loopfast_kernels":
            continue
        assert root in {"torch", "triton"} or root in sys.stdlib_module_names, f"{name} imports {imported}"
    absolute = [node for node in nodes(KERNELS[name]) if isinstance(node, ast.ImportFrom) and node.level == 0]
    assert not any((node.module or "").startswith("loopfast") for node in absolute), (
        "imports must be relative"
    )


# Another host's date, and the date on a report.
WALL_CLOCK = {"loopfast.rewards.http", "loopfast.reporting.report"}


@pytest.mark.parametrize("name", sorted(ENGINE.keys() - WALL_CLOCK))
def test_durations_are_measured_by_a_clock_that_does_not_jump(name):
    calls = [ast.unparse(node) for node in nodes(ENGINE[name]) if isinstance(node, ast.Call)]
    assert not {"time.time()", "time()", "datetime.now()"} & set(calls)


# The whole configuration goes to the command line, the planner, what starts a run, the run's folder, and what loads a
# run from its folder. Everything else takes the section or the number that it needs.
WHOLE_CONFIGURATION = {
    "loopfast.api",
    "loopfast.cli",
    "loopfast.config",
    "loopfast.evaluation.benchmark.command",
    "loopfast.evaluation.exported",
    "loopfast.evaluation.models",
    "loopfast.exporting.card",
    "loopfast.planning",
    "loopfast.run.folder",
    "loopfast.training.objects",
    "loopfast.training.setup",
    "loopfast.training.train",
}


def takes_configuration(module: Path) -> list[str]:
    """Returns the functions that have a parameter whose type is the whole configuration."""
    found = []
    for node in nodes(module):
        if isinstance(node, ast.FunctionDef):
            parameters = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            types = [part for each in parameters if each.annotation for part in ast.walk(each.annotation)]
            if any(isinstance(part, ast.Name) and part.id == "Config" for part in types):
                found.append(node.name)
    return found


@pytest.mark.parametrize("name", sorted(ENGINE))
def test_the_whole_configuration_goes_to_few(name):
    allowed = any(name == place or name.startswith(f"{place}.") for place in WHOLE_CONFIGURATION)
    assert allowed or takes_configuration(ENGINE[name]) == []


def test_a_configuration_is_found_among_parameters(tmp_path):
    module = tmp_path / "module.py"
    source = "def a(config: Config): ...\ndef b(*, c: str | Config = 1): ...\ndef d(c: ModelConfig) -> Config: ...\n"
    module.write_text(source)
    assert takes_configuration(module) == ["a", "b"]


def test_importing_the_engine_imports_nothing_else():
    program = """
import sys
before = set(sys.modules)
import loopfast
brought = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(brought - set(sys.stdlib_module_names)))
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout.strip() == "['loopfast']"


def test_imports_are_found_wherever_they_stand(tmp_path):
    source = tmp_path / "policies.py"
    source.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from loopfast.training.train import Trainer\n"
        "def late():\n    from . import cli\n    import loopfast.planning\n"
    )
    assert sorted(imports("loopfast.policies", source)) == [
        "loopfast.cli",
        "loopfast.planning",
        "loopfast.training.train.Trainer",
        "typing.TYPE_CHECKING",
    ]
    assert imported_modules("loopfast.policies", source, ENGINE) == {
        "loopfast.cli",
        "loopfast.planning",
        "loopfast.training.train",
    }


def test_the_page_is_a_page_and_its_parts_are_small():
    files = {
        path.name: path.read_text().splitlines() for path in (ROOT / "loopfast" / "training").glob("*.py")
    }
    assert len(files["train.py"]) <= 230
    assert {name: len(lines) for name, lines in files.items() if len(lines) >= 250} == {}
    functions = {
        (name, node.name): node.end_lineno - node.lineno + 1
        for name, lines in files.items()
        for node in ast.walk(ast.parse("\n".join(lines)))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    }
    assert {name: length for name, length in functions.items() if length > 60} == {}
    assert len(list((ROOT / "loopfast").glob("*.py"))) <= 9
