"""Odd input in large numbers: ``python -m tests.fuzz --inputs 100000 --seed 0 [--kind yaml]``.

Each input succeeds, or ends with one error message. Anything else is a finding. It is printed with options that repeat
it: ``--kind KIND --seed SEED --only NUMBER``.
"""

# ruff: noqa: SIM905 - lists of words are shorter in this form

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import typer.main

import loopfast.__main__ as program
import loopfast.cli
import loopfast.config
import loopfast.rewards
from loopfast.config import config_to_yaml, json_schema, parse_config, recipes
from loopfast.distributed.launcher import read_launch_environment
from loopfast.engines import deepspeed_settings
from loopfast.errors import LoopfastError
from loopfast.prompts import load_prompts

SECONDS = 60  # an input that takes longer hangs; one takes some milliseconds, on a busy machine some seconds
BYTES = 8 * 2**30  # limit of memory; an input that needs more ends with a MemoryError

# fmt: off
TEXTS = ["", " ", "a: b", "a\nb", "a\tb", "a\r\nb", "a\x00b", "± → σ", "word " * 500, "x" * 300, "9" * 5000]
TEXTS += "~ . .. / a tiny embedded auto none null true yes off NaN -1 0 1 2.5 1e999 -1e999 .nan .inf 0x10".split()
TEXTS += "1_000 1:30 ٣ 2001-01-01 a=b = -- - --help module:function os:system cuda:7 0:5 5: é 😀 * %s {}".split()
TEXTS += "[red]x[/b] <b> ${HOME} ~/none http://localhost:1/ embedded: t2i-compbench:a:color runs/none".split()
TEXTS += ["/dev/null", "/dev/full", "/proc/self/mem", "/proc/x", "\u200b", "\x85", "\u2028", "\ufeff", "\x1b[31m"]
TEXTS += ["\udcff", "\ud800"]
YAML = ["[1, [2, [3]]]", "{a: {b: {c: 1}}}", "{a: 1, a: 2}", "[" * 200, "{a: " * 200, "- - - -", "&a [*a]", "&a 1"]
YAML += ["!!python/object/apply:os.system [ls]", "!!binary aGk=", "!!set {a}", "!!timestamp 2001-01-01", "!x 1"]
YAML += ['"\\ud800"', '"\\udcff"', '"\\x00"', '"\\U00110000"', "'\\n'", "? [x]", "<<: {a: 1}", "%YAML 9.9", "# x"]
YAML += ["!!int x", "!!float ''", "!!bool 2", "{name: embedded}", "[{name: jpeg_compressibility, weight: 0}]"]
YAML += "[] {} [ { ] \" ' | >- *a --- ... 1e-400 -0 +1 0o7 1. .5 @ ` 1e-4".split()
NOISE = "\x00\x01\x7f\x85\xa0\ud800\u2028\ufeff\ufffe😀é\"'[]{}:,#&*!|>%@`-?~\n\r\t\\ 0e."
TINY = (Path(loopfast.config.__file__).parents[1] / "recipes" / "tiny.yaml").read_text("utf-8")
PROMPTS = ['{"prompt": "a cat"}\n{"text": "a dog"}\n', '["a cat", {"prompt": 1}]', "prompt,n\na cat,1\n", "- a cat\n"]
LAUNCHERS = """RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT TORCHELASTIC_RESTART_COUNT SLURM_PROCID SLURM_LOCALID
SLURM_STEP_NUM_TASKS SLURM_STEP_NODELIST SLURM_STEP_ID SLURM_JOB_ID OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE
OMPI_COMM_WORLD_LOCAL_RANK PMI_RANK PMI_SIZE MPI_LOCALRANKID""".split()
DEEPSPEED = """zero_optimization stage optimizer fp16 bf16 enabled offload_optimizer device scheduler gradient_clipping
train_batch_size steps_per_print communication_data_type reduce_bucket_size""".split()
RIGHT = [{"steps_per_print": 10}, {"fp16": {"enabled": "auto"}}, {"zero_optimization": {"overlap_comm": False}}]
RIGHT += [{"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, {"wall_clock_breakdown": True}, {}]
# Functions that load, train, serve or start something: only the code before them is tested.
WORKS = """training.train.train distributed.launch.launch planning.profile.profile evaluation.sample_images
cli.inspection.replace_process rewards.serve.serve_rewards planning.plan policies.load_schedule""".split()
# fmt: on

Given = tuple[Callable[[], object], object]
"""A call, and what it is given, for messages."""


def text(rng: random.Random) -> str:
    """Returns a text that a program may not expect."""
    return (
        rng.choice(TEXTS)
        if rng.random() < 0.8
        else "".join(rng.choices(NOISE + "abc.=/", k=rng.randrange(12)))
    )


def damaged(rng: random.Random, whole: str) -> str:
    """Returns a text after some edits."""
    for _ in range(rng.randrange(1, 4)):
        at, end = sorted(rng.randrange(len(whole) + 1) for _ in range(2))
        new = rng.choice(["", rng.choice(NOISE), whole[at:end], rng.choice(YAML)])
        whole = whole[:at] + new + whole[min(at + rng.randrange(4), end) :]
    return whole


@functools.cache
def keys() -> list[tuple[str, dict[str, Any]]]:
    """Returns every key of a configuration, and its schema."""
    schema = json_schema()

    def below(part: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        part = schema["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
        yield path, part
        for key, inner in part.get("properties", {}).items():
            yield from below(inner, f"{path}.{key}".lstrip("."))
        if "items" in part:
            yield from below(part["items"], f"{path}.0")

    return list(below(schema, ""))[1:]


def value(rng: random.Random, schema: dict[str, Any]) -> str:
    """Returns a value in YAML; some are valid."""
    kind = rng.choice(schema.get("anyOf", [schema]))
    bounds = [bound for name, bound in kind.items() if re.match("minimum|maximum|exclusive", name)]
    right = [*kind.get("enum", []), *(bound + step for bound in bounds for step in (-1, 0, 1, 0.5))]
    if right and rng.random() < 0.5:
        return str(rng.choice(right))
    return rng.choice([rng.choice(YAML), text(rng), str(schema.get("default"))])


def assignment(rng: random.Random) -> str:
    """Returns an argument of ``--set``."""
    key, schema = rng.choice(keys())
    return f"{damaged(rng, key) if rng.random() < 0.1 else key}={value(rng, schema)}"


def yaml_input(rng: random.Random, folder: Path) -> Given:
    whole = "model: {pretrained: embedded}\nreward: [{name: embedded}]\n"
    for key, schema in rng.sample(keys(), rng.randrange(3)):
        section, *rest = key.split(".")
        found = value(rng, schema)
        for part in reversed(rest):
            found = f"[{found}]" if part == "0" else f"{{{part}: {found}}}"
        whole += f"{section}: {found}\n"
    if rng.random() < 0.3:
        whole = damaged(rng, rng.choice([whole, TINY]))
    overrides = [assignment(rng) for _ in range(rng.randrange(3))]

    def read() -> None:
        config = parse_config(whole, overrides)
        written = config_to_yaml(config)
        assert parse_config(written.encode().decode()) == config, "what is written is not what was read"

    return read, (whole, overrides)


def leaves(command: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], list[Any]]]:
    """Returns every command below one, and its parameters."""
    if hasattr(command, "commands"):
        return [leaf for name, inner in command.commands.items() for leaf in leaves(inner, (*path, name))]
    return [(path, command.params)]


def command_input(rng: random.Random, folder: Path) -> Given:
    path, parameters = rng.choice(leaves(typer.main.get_command(loopfast.cli.app)))
    configs = [*recipes(), *["tiny"] * 4, *map(str, sorted(folder.iterdir())), str(folder)]

    def argument() -> str:
        return rng.choice([rng.choice(configs), text(rng), assignment(rng), str(rng.randrange(-1, 9))])

    arguments = list(path)
    for parameter in parameters:
        names = parameter.opts if parameter.param_type_name == "option" else []
        wanted = parameter.name in ("config", "target", "run", "runs", "to")
        if rng.random() < (0.9 if wanted else 0.15):
            arguments += [rng.choice(names)] if names else []
            if not getattr(parameter, "is_flag", False):
                arguments.append(rng.choice(configs) if wanted and rng.random() < 0.8 else argument())
    for _ in range(rng.choice([0, 0, 1, 3])):
        arguments += ["--set", assignment(rng)]
    if rng.random() < 0.1:
        arguments.insert(rng.randrange(len(arguments) + 1), text(rng))
    # as a shell passes them: without NUL, and bytes that are not UTF-8 as surrogates of one kind
    arguments = [part.replace("\x00", "").replace("\ud800", "\udc80") for part in arguments]
    return lambda: program.main(arguments), arguments


def prompts_input(rng: random.Random, folder: Path) -> Given:
    whole = rng.choice([*PROMPTS, *TEXTS])
    encoding = rng.choice(["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "gbk"])
    data = (damaged(rng, whole) if rng.random() < 0.6 else whole).encode(encoding, "replace")
    data += rng.randbytes(rng.choice([0, 0, 1, 20]))
    file = (
        folder
        / f"prompts{rng.choice(['.txt', '.json', '.jsonl', '.csv', '.tsv', '.yaml', '.parquet', '.gz', ''])}"
    )
    file.write_bytes(data)
    source = text(rng) if rng.random() < 0.1 else str(file)
    return lambda: load_prompts(source), (source, data)


def deepspeed_input(rng: random.Random, folder: Path) -> Given:
    def some(depth: int) -> Any:
        kind = rng.randrange(4) if depth else rng.randrange(2)
        if kind == 0:
            return rng.choice([None, True, False, 0, 1, 2, 3, -1, 1e30, 10**30, float("nan"), "auto", "cpu"])
        if kind == 1:
            return text(rng)
        if kind == 2:
            return [some(depth - 1) for _ in range(rng.randrange(3))]
        return {rng.choice([*DEEPSPEED, text(rng)]): some(depth - 1) for _ in range(rng.randrange(4))}

    share = rng.random()
    given = some(3) if share < 0.2 else {rng.choice(DEEPSPEED): some(2) for _ in range(rng.randrange(1, 4))}
    written = json.dumps(given if share < 0.7 else rng.choice(RIGHT) | rng.choice(RIGHT))
    file, stage = folder / "deepspeed.json", rng.randrange(4)
    file.write_bytes(
        (damaged(rng, written) if rng.random() < 0.2 else written).encode("utf-8", "surrogatepass")
    )
    config = parse_config(TINY, [f"distributed={{zero_stage: {stage}, deepspeed: {file}}}"])
    return lambda: deepspeed_settings(config.train, config.distributed, config.model.dtype, 10**6), (
        stage,
        file.read_bytes(),
    )


def environment_input(rng: random.Random, folder: Path) -> Given:
    values = ["0", "1", "2", "4", "29500", "tcp://10.0.0.1:29500", "batch", "gpu[03-05,9]"]
    names = rng.sample(LAUNCHERS, rng.randrange(len(LAUNCHERS)))
    environment = {name: rng.choice([rng.choice(values), text(rng)]) for name in names}
    return lambda: read_launch_environment(environment), environment


KINDS: dict[str, Callable[[random.Random, Path], Given]] = {
    "yaml": yaml_input,
    "command": command_input,
    "prompts": prompts_input,
    "deepspeed": deepspeed_input,
    "environment": environment_input,
}


class Hangs(BaseException):
    """Raised if an input takes too long."""


def outcome(call: Callable[[], object]) -> tuple[str, str]:
    """Returns the outcome of an input, ``accepted``, ``refused`` or ``finding``, and a finding's description."""
    output, errors = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    with mock.patch.multiple(sys, stdout=output, stderr=errors):
        try:
            found = call()
            code = found if type(found) is int else 0
        except LoopfastError as error:
            code = error.exit_code
            errors.reconfigure(errors="backslashreplace")
            print(f"error: {error}", file=errors)
        except (Exception, SystemExit, KeyboardInterrupt, Hangs) as error:
            return "finding", "".join(traceback.format_exception(error)[-4:])
    errors.flush()
    written = errors.buffer.getvalue().decode()  # type: ignore[attr-defined]
    if code not in (0, 1, 2, 130, 143) or "Traceback" in written:
        return "finding", f"exit code {code}: {written}"
    # a warning may come before it, and a configuration's problems are a list
    message = written[written.find("error: ") :].rstrip("\n").split("\n") if "error: " in written else [""]
    if len(message) > 1 and not (" problems" in message[0] and all(line[:2] == "  " for line in message[1:])):
        return "finding", f"a message of several lines: {written!r}"
    return ("refused" if code else "accepted"), ""


@contextmanager
def harmless() -> Iterator[Path]:
    """Context with a folder of odd inputs, in which no command loads, trains, serves or starts anything."""

    def reached(*_: Any, **__: Any) -> None:
        raise LoopfastError("reached")

    def build_rewards(*given: Any, load: bool = True, **options: Any) -> Any:
        return reached() if load else build(*given, load=False, **options)

    build, begun = loopfast.rewards.build_rewards, Path.cwd()
    patches = [mock.patch(f"loopfast.{work}", reached) for work in WORKS]
    patches.append(mock.patch("loopfast.rewards.build_rewards", build_rewards))
    # it is built again for each command line
    patches.append(mock.patch("typer.main.get_command", functools.cache(typer.main.get_command)))
    with tempfile.TemporaryDirectory() as name:
        inputs = Path(name) / "inputs"
        for run, config in (("empty", ""), ("garbage", "\x00"), ("wrong", "a: 1"), ("bare", TINY)):
            (inputs / run).mkdir(parents=True)
            (inputs / run / "config.yaml").write_text(config, "utf-8")
        (inputs / "latin1.yaml").write_bytes(b"run: {name: \xe9}")
        os.chdir(name)
        for patch in patches:
            patch.start()
        try:
            yield inputs
        finally:
            for patch in patches:
                patch.stop()
            os.chdir(begun)


def fuzz(kind: str, numbers: range, seed: int, say: Callable[[str], None]) -> Counter[str]:
    """Returns the outcomes of this number of inputs of a kind."""

    def hangs(*_: Any) -> None:
        raise Hangs(f"more than {SECONDS} s")

    counts: Counter[str] = Counter()
    before = signal.signal(signal.SIGALRM, hangs)
    try:
        with harmless() as folder:
            for number in numbers:
                call, given = KINDS[kind](random.Random(f"{seed}/{kind}/{number}"), folder)
                signal.alarm(SECONDS)
                ended, words = outcome(call)
                signal.alarm(0)
                counts[ended] += 1
                if ended == "finding":
                    say(f"--kind {kind} --seed {seed} --only {number}: {given!a}\n{words}\n")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="Try odd input, and print findings."
    )
    parser.add_argument("--inputs", type=int, default=1000, help="number of inputs of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kind", choices=KINDS, action="append", help="may be given several times; default: all"
    )
    parser.add_argument("--only", type=int, help="the number of the one input to repeat")
    given = parser.parse_args()
    numbers = range(given.inputs) if given.only is None else range(given.only, given.only + 1)
    findings = 0
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    for kind in given.kind or KINDS:
        began = time.monotonic()
        counts = fuzz(kind, numbers, given.seed, functools.partial(print, flush=True))
        findings += counts["finding"]
        ended = ", ".join(f"{counts[end]} {end}" for end in ("accepted", "refused", "finding"))
        print(f"{kind}: {len(numbers)} inputs: {ended}, {time.monotonic() - began:.0f} s", flush=True)
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
