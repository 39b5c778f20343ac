"""Who may import whom: the order of the layers, and the two packages' one direction."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From bottom to top. A module may import from its own layer and from those below.
LAYERS = [
    {
        "",
        "allocator",
        "errors",
        "files",
        "group",
        "interrupts",
        "join",
        "memory",
        "place",
        "processor",
        "profiling",
        "prompt_datasets",
        "prompt_files",
        "recipes",
        "run_lock",
        "seeds",
        "streams",
        "t2i_compbench",
        "watch",
        "xformers_build",
    },
    {"schedules", "algorithms", "config", "plugins"},
    {"policies", "trajectories", "prompts", "embedded", "integrations"},
    {"identity", "rollout", "engines", "rewards", "checkpoints", "tracking", "console", "microbatch"},
    {"rounding", "share", "surrogate"},
    {"replay"},
    {"update", "runs", "evaluation", "exporting", "planning", "reporting"},
    {"judging"},
    {"train", "profile_run"},
    {"cli", "doctor", "launch", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules(package: Path) -> dict[str, Path]:
    """Every module of a package by its full name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        yield node
        yield from statements(node)


def imports(name: str, path: Path) -> Iterator[str]:
    """Full names of what a module imports, inside functions too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in statements(ast.parse(path.read_text())):
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


@pytest.mark.parametrize("name", sorted(ENGINE))
def test_a_module_imports_from_its_layer_and_below(name):
    for imported in imports(name, ENGINE[name]):
        if imported.split(".")[0] == "loopfast":
            # Names that are no module, such as loopfast.__version__, belong to the package itself.
            target = layer(imported) if layer(imported) in LEVEL else ""
            assert LEVEL[target] <= LEVEL[layer(name)], (
                f"{name} imports {imported} from a layer above its own"
            )


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_the_kernels_stand_alone(name):
    for imported in imports(name, KERNELS[name]):
        root = imported.split(".")[0]
        if root == "loopfast_kernels":
            continue
        assert root in {"torch", "triton"} or root in sys.stdlib_module_names, f"{name} imports {imported}"
    tree = ast.parse(KERNELS[name].read_text())
    absolute = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0]
    assert not any((node.module or "").startswith("loopfast") for node in absolute), (
        "imports must be relative"
    )


# Another host's date, and the date on a report.
WALL_CLOCK = {"loopfast.rewards.http", "loopfast.reporting.report"}


@pytest.mark.parametrize("name", sorted(ENGINE.keys() - WALL_CLOCK))
def test_durations_are_measured_by_a_clock_that_does_not_jump(name):
    calls = [
        ast.unparse(node)
        for node in statements(ast.parse(ENGINE[name].read_text()))
        if isinstance(node, ast.Call)
    ]
    assert not {"time.time()", "time()", "datetime.now()"} & set(calls)


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


def test_the_rules_are_enforced(tmp_path):
    source = tmp_path / "policies.py"
    source.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from loopfast.train import Trainer\n"
        "def late():\n    from . import cli\n    import loopfast.train\n"
    )
    assert list(imports("loopfast.policies", source)) == [
        "typing.TYPE_CHECKING",
        "loopfast.cli",
        "loopfast.train",
    ]
