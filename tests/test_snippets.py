"""Every snippet of the documents and of ``--help``, from the text: python runs, the rest is what is allowed."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
import yaml

from loopfast.cli import app
from loopfast.config import config_to_yaml, load_config, parse_config, recipes
from loopfast.policies import load_policy
from tests.policies.test_families import settings, weights
from tests.test_documentation import DOCUMENTS, ROOT


class Snippet(NamedTuple):
    document: str
    line: int
    language: str
    text: str


def snippets() -> Iterator[Snippet]:
    for path in DOCUMENTS:
        text = path.read_text("utf-8")
        for block in re.finditer(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, block.start()) + 1
            yield Snippet(str(path.relative_to(ROOT)), line, block.group(1), block.group(2))


def of(*languages: str) -> Any:
    chosen = [snippet for snippet in SNIPPETS if snippet.language in languages]
    return pytest.mark.parametrize("snippet", chosen, ids=lambda s: f"{s.document}:{s.line}")


SNIPPETS = list(snippets())
COMMAND_LINE = typer.main.get_command(app)
# newer releases of typer have a click of their own
USAGE_ERROR: Any = typer.BadParameter.__base__

# Words of a python snippet, and why it is only compiled here.
NOT_RUN = {
    "DDPOTrainer(": "needs TRL's trainer; tests/integrations runs patch_trl under it",
    "patch_ddpo_pytorch()": "needs the scripts of ddpo-pytorch; tests/integrations runs it with them",
    "patch_flow_grpo()": "needs the scripts of Flow-GRPO; tests/integrations runs it with them",
    "serve_forever()": "is a server on a fixed port that never ends; tests/rewards/test_http.py runs the rest of it",
}
# Documents whose python is run elsewhere.
ELSEWHERE = {"kernels/README.md": "tests/kernels/test_readme.py runs it, without loopfast"}


def test_snippets_are_in_languages_that_are_tested() -> None:
    assert {snippet.language for snippet in SNIPPETS} == {"python", "yaml", "sh", "json"}


@of("python")
def test_python_runs(
    snippet: Snippet, family_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = compile(snippet.text, f"{snippet.document}:{snippet.line}", "exec")
    if snippet.document in ELSEWHERE or any(word in snippet.text for word in NOT_RUN):
        return
    monkeypatch.chdir(tmp_path)
    if "/models/sd15" in snippet.text:
        # what the commands above it have made: here a LoRA of a tiny model
        sd15 = family_folder("sd")
        policy = load_policy(settings(sd15))
        policy.export(tmp_path / "sd15-aesthetic-lora", weights(policy))
        code = compile(snippet.text.replace("/models/sd15", str(sd15)), snippet.document, "exec")
    names: dict[str, Any] = {}
    exec(code, names)
    if "def reward(" in snippet.text:
        scores = names["reward"](torch.rand(2, 3, 4, 4), ["a", "b"], [{}, {}])
        assert scores.shape == (2,)
        assert scores.isfinite().all()


@of("yaml")
def test_yaml_is_a_configuration(snippet: Snippet) -> None:
    """A part of one goes over the recipe `tiny`."""
    data = yaml.safe_load(config_to_yaml(load_config("tiny")))
    for section, values in yaml.safe_load(snippet.text).items():
        data[section] = {**data[section], **values} if isinstance(values, dict) else values
    parse_config(yaml.safe_dump(data), name=snippet.document)


@of("json")
def test_json_is_json(snippet: Snippet) -> None:
    json.loads(snippet.text)


def commands(text: str) -> Iterator[list[str]]:
    """Arguments of each call of loopfast in a script of the shell."""
    text = text.replace("\\\n", " ")
    loop = re.search(r"^for (\w+) in ([^;\n]*);", text, re.MULTILINE)
    if loop:
        text = text.replace(f"${loop.group(1)}", loop.group(2).split()[0])
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if "loopfast" in words:
            words = words[words.index("loopfast") + 1 :]
            yield words[: words.index(">")] if ">" in words else words


def parse(arguments: list[str]) -> None:
    """Raises a usage error of click or `ConfigError` for what the command line would refuse; runs nothing."""
    command: Any = COMMAND_LINE
    context = command.make_context("loopfast", list(arguments), resilient_parsing=False)
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    check_configuration(arguments)


def check_configuration(arguments: list[str]) -> None:
    """Of a recipe or a file that a document calls its own, with the changes of the command line."""
    if "--config" not in arguments:
        return
    source = arguments[arguments.index("--config") + 1]
    pairs = itertools.pairwise(arguments)
    overrides = [value for option, value in pairs if option in ("--set", "-s")]
    load_config(source if source in recipes() else "tiny", overrides)


@of("sh")
def test_commands_are_those_of_the_command_line(snippet: Snippet) -> None:
    for arguments in commands(snippet.text):
        parse(arguments)


def examples() -> list[str]:
    """Commands that ``--help`` shows as examples."""
    group: Any = COMMAND_LINE
    found = [group, *group.commands.values(), *group.commands["config"].commands.values()]
    return [text for command in found for text in re.findall(r"`loopfast ([^`]*)`", command.epilog or "")]


@pytest.mark.parametrize("example", examples())
def test_examples_of_the_help_are_those_of_the_command_line(example: str) -> None:
    [arguments] = commands(f"loopfast {example.replace(chr(10), ' ')}")
    parse(arguments)


def test_a_wrong_command_is_found() -> None:
    """So that the tests above mean something."""
    for wrong in (["train"], ["sample"], ["evaluate", "x"], ["plan", "--config", "tiny", "--gpu", "4"]):
        with pytest.raises(USAGE_ERROR):
            parse(wrong)
    assert list(commands("srun loopfast train --config a \\\n  --set b=c # d")) == [
        ["train", "--config", "a", "--set", "b=c"]
    ]
