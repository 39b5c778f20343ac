from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from loopfast.algorithms import ALGORITHMS
from loopfast.config import (
    AlgorithmConfig,
    Config,
    config_to_yaml,
    json_schema,
    load_config,
    parse_config,
    recipes,
)
from loopfast.config.messages import differences
from loopfast.errors import ConfigError, one_line

MINIMAL = "model: {pretrained: embedded}\n"


def error_of(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, overrides, name="mine.yaml")
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("name", recipes())
def test_recipe_is_valid_and_survives_a_round_trip(name: str) -> None:
    config = load_config(name)
    assert config.run.name == name
    assert parse_config(config_to_yaml(config)) == config


def test_only_the_model_has_no_default() -> None:
    config = parse_config(MINIMAL)
    assert config.model.pretrained == "embedded"
    assert config.algorithm.name == "loop"
    assert config.train.steps == "auto"
    for text in ("", "model:\n", "run: {seed: 1}\n"):
        message = error_of(text)
        assert "model.pretrained is missing" in message
        assert "hub name" in message


def test_section_with_all_keys_commented_out_is_all_defaults() -> None:
    assert parse_config(MINIMAL + "train:\n  # iterations: 3\n") == parse_config(MINIMAL)


def test_configuration_cannot_be_changed_once_read() -> None:
    with pytest.raises(ValidationError):
        parse_config(MINIMAL).train.iterations = 3


def test_every_algorithm_can_be_named() -> None:
    assert set(get_args(AlgorithmConfig.model_fields["name"].annotation)) == set(ALGORITHMS)


@pytest.mark.parametrize(
    ("line", "key", "nearest"),
    [
        ("train: {iteration: 3}", "train.iteration", "train.iterations"),
        ("train: {lr: 3}", "train.lr", "train.learning_rate"),
        ("learning_rate: 3", "learning_rate", "train.learning_rate"),
        ("lora: {rank: 3}", "lora", "model.lora"),
        ("trian: {}", "trian", "train"),
        ("algorithm: {advantage: {Clip: 1.0}}", "algorithm.advantage.Clip", "algorithm.advantage.clip"),
        ("reward: [{name: embedded, wieght: 1}]", "reward.0.wieght", "reward.0.weight"),
        ("3: 4", "3", "run"),
    ],
)
def test_unknown_key_is_reported_with_its_line_and_the_nearest_known_one(
    line: str, key: str, nearest: str
) -> None:
    message = error_of(f"{MINIMAL}\n\n{line}\n")
    assert message.startswith(f"mine.yaml, line 4: unknown key {key!r}; nearest known key: ")
    if key != "3":
        assert message.endswith(repr(nearest))


@pytest.mark.parametrize(
    ("override", "found", "allowed"),
    [
        ("train.iterations=0", "0", "a whole number >= 1"),
        ("train.iterations=3.0", "3.0", "a whole number >= 1"),
        ("train.iterations=true", "true", "a whole number >= 1"),
        ("train.iterations='3'", "'3'", "a whole number >= 1"),
        ("train.iterations=null", "null", "a whole number >= 1"),
        ("train.iterations=99999999999999999999", "99999999999999999999", "a whole number >= 1"),
        ("train.learning_rate=fast", "'fast'", "a number > 0"),
        ("train.learning_rate=0", "0", "a number > 0"),
        (f"train.learning_rate=1{'0' * 400}", f"1{'0' * 56}...", "a number > 0"),
        ("train.learning_rate=.nan", ".nan", "a number > 0"),
        ("train.learning_rate=1e999", ".inf", "a number > 0"),
        ("train.beta2=1", "1", "a number >= 0 and < 1"),
        ("train.lr_schedule=step", "'step'", "constant or linear or cosine"),
        ("train.on_policy_check=no", "'no'", "error or warn or off"),
        ("train.screening=true", "true", "auto or on or off"),
        ("train.microbatch=0", "0", "auto or a whole number >= 1"),
        ("train.steps=5", "5", "all, auto or a half-open range"),
        ("train.steps=5-9", "'5-9'", "all, auto or a half-open range"),
        ("rollout.eta=1.5", "1.5", "null or a number > 0 and <= 1"),
        ("model.device=gpu", "'gpu'", "auto, cpu, cuda or cuda:N"),
        ("model.pretrained=' '", "' '", "text that is not empty"),
        (f"run.name={'a' * 200}", f"'{'a' * 57}...'", "letters, digits"),
        ("model.lora.targets=to_q", "'to_q'", "null or a list, each text that is not empty"),
        ("model.lora.targets=[3]", "a list", "null or a list, each text that is not empty"),
        ("run.name=../elsewhere", "'../elsewhere'", "letters, digits"),
        ("run.trackers=[mlflow]", "'mlflow'", "tensorboard or wandb"),
        ("evaluation={a: b}", "", ""),
        ("evaluation=[]", "a list", "a mapping with the keys every, prompts"),
        ("checkpoint.keep_best=1", "1", "true or false"),
        (
            "reward=[]",
            "a list",
            "a list with at least one item, each a mapping with the keys name, label, weight, normalize, range",
        ),
        ("reward={name: embedded}", "a mapping", "a list with at least one item"),
        ("reward.0.options=3", "3", "a mapping"),
    ],
)
def test_wrong_value_is_reported_with_key_value_and_what_is_allowed(
    override: str, found: str, allowed: str
) -> None:
    message = error_of(MINIMAL + "reward: [{name: embedded}]", override)
    assert message.startswith(f"--set {one_line(override)}: ")
    if found:
        assert f": found {found}, allowed: {allowed}" in message
        assert override.partition("=")[0] in message


def test_wrong_value_in_a_file_is_reported_with_its_line() -> None:
    message = error_of(f"{MINIMAL}train:\n  iterations: 5\n  learning_rate:\n    fast\n")
    assert message == "mine.yaml, line 4: train.learning_rate: found 'fast', allowed: a number > 0"


def test_all_problems_are_reported_at_once() -> None:
    first, *rest = error_of("train:\n  lr: 3\n  iterations: 0\nrollout:\n  steps: x\n").splitlines()
    assert first == "4 problems"
    assert {line.split(":")[0].strip() for line in rest} == {
        "mine.yaml",
        "mine.yaml, line 2",
        "mine.yaml, line 3",
        "mine.yaml, line 5",
    }


@pytest.mark.parametrize(
    ("overrides", "key", "reason"),
    [
        (
            ["algorithm.name=loop", "algorithm.samples_per_prompt=1"],
            "algorithm.samples_per_prompt",
            "2 or more",
        ),
        (
            ["algorithm.name=rloo", "algorithm.samples_per_prompt=1"],
            "algorithm.samples_per_prompt",
            "2 or more",
        ),
        (
            ["algorithm.name=grpo", "algorithm.samples_per_prompt=1"],
            "algorithm.samples_per_prompt",
            "2 or more",
        ),
        (["algorithm.name=rloo", "train.inner_epochs=2"], "train.inner_epochs", "1 with rloo"),
        (["algorithm.name=reinforce", "train.inner_epochs=2"], "train.inner_epochs", "1 with reinforce"),
        (["algorithm.name=rloo", "algorithm.clip_range=0.2"], "algorithm.clip_range", "does not clip"),
        (["rollout.eta=1", "rollout.noise_level=0.7"], "rollout.noise_level", "null beside rollout.eta"),
        (["train.steps=5:5"], "train.steps", "START < STOP inside 0:10"),
        (["train.steps=5:11"], "train.steps", "START < STOP inside 0:10"),
        (["train.steps=10:"], "train.steps", "START < STOP inside 0:10"),
        (["train.steps=:0"], "train.steps", "START < STOP inside 0:10"),
        (
            ["rollout.prompts_per_iteration=1", "train.steps=:2", "train.updates_per_iteration=9"],
            "train.updates_per_iteration",
            "at most 8",
        ),
        (
            [
                "rollout.prompts_per_iteration=1",
                "train.steps=:2",
                "train.step_fraction=0.5",
                "train.updates_per_iteration=5",
            ],
            "train.updates_per_iteration",
            "at most 4",
        ),
        (["train.steps=:4", "train.step_fraction=0.12"], "train.step_fraction", "at least 0.125"),
        (["train.steps=9:", "train.step_fraction=0.4"], "train.step_fraction", "at least 0.5"),
        (
            ["model.channels_last=on", "train.optimizer=adamw_8bit"],
            "train.optimizer",
            "lay the weights out",
        ),
        (
            ["algorithm.kl_weight=0.1", "train.screening=on"],
            "train.screening",
            "algorithm.kl_weight above 0",
        ),
        (["algorithm.name=rloo", "train.screening=on"], "train.screening", "rloo, which does not clip"),
        (["reward=[{name: embedded, weight: 0}]"], "reward.0.weight", "at least one reward"),
        (["reward=[{name: embedded}, {name: embedded}]"], "reward.1.name", "each reward once"),
    ],
)
def test_keys_that_contradict_each_other_are_reported(overrides: list[str], key: str, reason: str) -> None:
    message = error_of(MINIMAL, *overrides)
    assert f"--set {overrides[-1]}: {key}: found " in message
    assert reason in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.name=ppo", "algorithm.samples_per_prompt=1", "train.inner_epochs=2"],
        ["algorithm.name=reinforce_plain", "algorithm.samples_per_prompt=1"],
        ["train.steps=9:10"],
        ["train.steps=:10"],
        ["train.steps=5:"],
        ["rollout.prompts_per_iteration=1", "train.steps=:2", "train.updates_per_iteration=8"],
        ["train.steps=:4", "train.step_fraction=0.125"],
        ["model.channels_last=on", "model.tune=lora", "train.optimizer=adamw_8bit"],
        ["algorithm.kl_weight=0.1", "train.screening=auto"],
        ["algorithm.name=ppo", "train.screening=on"],
    ],
)
def test_keys_that_only_just_agree_are_accepted(overrides: list[str]) -> None:
    parse_config(MINIMAL, overrides)


def test_yaml_is_read_by_version_1_2() -> None:
    config = parse_config(
        MINIMAL + "train: {on_policy_check: off, steps: 1:5, learning_rate: 1e-4}\nrun: {name: no}"
    )
    assert config.train.on_policy_check == "off"
    assert config.train.steps == "1:5"
    assert config.train.learning_rate == 1e-4
    assert config.run.name == "no"


@pytest.mark.parametrize("name", ["no", "0777", "1e5", "1_000", "0x10", "null", "2020-01-01", "1.5", "007"])
def test_text_that_looks_like_something_else_survives_a_round_trip(name: str) -> None:
    config = parse_config(MINIMAL, [f"run.name='{name}'", "train.on_policy_check=off", "train.steps=1:9"])
    text = config_to_yaml(config)
    assert config.run.name == name
    assert parse_config(text) == config
    assert yaml.safe_load(text)["run"]["name"] == name
    assert yaml.safe_load(text)["train"]["on_policy_check"] == "off"
    assert yaml.safe_load(text)["train"]["steps"] == "1:9"


def test_overrides_apply_in_order_and_reach_into_lists_and_missing_sections() -> None:
    config = parse_config(
        MINIMAL,
        [
            "reward=[{name: embedded}, {name: my.rewards:blue}]",
            "reward.1.weight=2",
            "reward.1.weight=0.5",
            "reward.1.options.scale=3",
            "prompts.source=a: b",
        ],
    )
    assert [term.weight for term in config.reward] == [1.0, 0.5]
    assert config.reward[1].options == {"scale": 3}
    assert config.prompts.source == "a: b"


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.iterations", "allowed: --set section.key=value"),
        ("=3", "allowed: --set section.key=value"),
        ("train..iterations=3", "allowed: --set section.key=value"),
        ("a" + ".a" * 20 + "=3", "allowed: --set section.key=value"),
        ("reward.2.weight=3", "reward has 1 item(s), numbered from 0; found '2'"),
        ("reward.x.weight=3", "reward has 1 item(s), numbered from 0; found 'x'"),
        ("model.pretrained.x=3", "model.pretrained is 'embedded' and has no keys"),
        ("run.name=[", "not valid YAML"),
        ("train.lerning_rate=3", "nearest known key: 'train.learning_rate'"),
    ],
)
def test_unusable_override_is_reported(override: str, reason: str) -> None:
    message = error_of(MINIMAL + "reward: [{name: embedded}]", override)
    assert message.startswith(f"--set {override}: ")
    assert reason in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model: {pretrained: [", "mine.yaml, line 1: not valid YAML"),
        ("model:\n  pretrained: a\n pretrained: b", "mine.yaml, line 3: not valid YAML"),
        ("model: \x07", "mine.yaml, line 1: not valid YAML"),
        ("a: 1\n---\nb: 2", "mine.yaml, line 2: not valid YAML"),
        ("- embedded", "found a list, allowed: a mapping with the keys run, model"),
        ("embedded", "found 'embedded', allowed: a mapping"),
        (MINIMAL + "train: {}\ntrain: {}", "line 3: key 'train' is given twice"),
        (MINIMAL + "run: &here {seed: 1}\ntrain: *here", "anchors and aliases are not supported"),
        ("model: &here [*here]", "anchors and aliases are not supported"),
        ("? [a, b]\n: c", "line 1: a key must be text"),
        ("model: !!python/object/apply:os.getcwd []", "is not supported"),
        ("model: !!int abc", "'abc' is not of type int"),
        ("run: {seed: " + "9" * 5000 + "}", "is not of type int"),
        ("reward: " + "[" * 17 + "]" * 17, "nested too deeply"),
        ("reward: " + "[" * 700, "nested too deeply"),
    ],
)
def test_unusable_yaml_is_reported(text: str, reason: str) -> None:
    assert reason in error_of(text)


def test_file_is_read_and_named_in_errors(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(MINIMAL + "run: {name: grüße}", "utf-8")
    with pytest.raises(ConfigError, match=r"mine\.yaml, line 2: run\.name: found 'grüße'"):
        load_config(file)
    assert load_config(str(file), ["run.name=hello"]).run.name == "hello"


def test_unreadable_source_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'nope'.*neither a file nor a recipe.*tiny"):
        load_config("nope")
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="cannot read"):
        load_config("a\0b")
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: gr\xfc\xdfe}")
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "latin.yaml")
    with pytest.raises(ConfigError, match=r"cannot read .*File too large"):
        load_config("/dev/zero")


def test_schema_describes_every_key() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == set(Config.model_fields)
    assert schema["required"] == ["model"]
    for section in [schema, *schema["$defs"].values()]:
        assert section["additionalProperties"] is False
        for key, value in section["properties"].items():
            target = schema["$defs"][value["$ref"].rpartition("/")[2]] if "$ref" in value else value
            assert value.get("description") or target.get("description"), f"{section['title']}.{key}"
            assert "default" in value or key in section["required"] or key == "options"


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["auto", "all", "0:5", "cuda:1", "lora", "embedded:color"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def paths(data: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested dictionaries and lists."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [prefix, *(path for key, value in inner for path in paths(value, (*prefix, key)))]


RECIPES = {name: load_config(name).model_dump(mode="json") for name in recipes()}
SHORT = yaml.dump({name: RECIPES["tiny"][name] for name in ("run", "model", "reward", "train")})


@st.composite
def mutated_recipes(draw: st.DrawFn) -> str:
    """The model and two sections of a recipe with values exchanged, keys renamed, and parts removed."""
    recipe = RECIPES[draw(st.sampled_from(recipes()))]
    chosen = {"model", *draw(st.lists(st.sampled_from(sorted(recipe)), min_size=2, max_size=2))}
    data = deepcopy({name: section for name, section in recipe.items() if name in chosen})
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from([path for path in paths(data) if path]))
        target = data
        for key in parents:
            target = target[key]
        action = draw(st.sampled_from(["replace", "remove", "rename"]))
        if action == "replace" or isinstance(target, list):
            target[last] = draw(values)
        elif action == "remove":
            del target[last]
        else:
            target[draw(st.text(max_size=8))] = target.pop(last)
    return yaml.dump(data, allow_unicode=draw(st.booleans()))


@st.composite
def damaged_recipes(draw: st.DrawFn) -> str:
    """A short recipe's text with a piece of it exchanged for another."""
    text = SHORT
    start = draw(st.integers(0, len(text)))
    stop = draw(st.integers(start, min(len(text), start + 20)))
    return (
        text[:start]
        + draw(st.text(st.sampled_from(":-{}[]&*!|>'\"%@`#,?\n\t ae10~<"), max_size=8))
        + text[stop:]
    )


def accepted_or_refused(text: str, overrides: list[str]) -> None:
    try:
        config = parse_config(text, overrides)
    except ConfigError:
        return
    assert parse_config(config_to_yaml(config)) == config


@settings(max_examples=100)
@given(mutated_recipes())
def test_mutated_values_never_give_a_traceback(text: str) -> None:
    accepted_or_refused(text, [])


@settings(max_examples=100)
@given(damaged_recipes() | st.text())
@example("%YAML 9" + "9" * 5000 + "\n---\n")
@example('"\\U99999999"')
def test_damaged_text_never_gives_a_traceback(text: str) -> None:
    accepted_or_refused(text, [])


keys = st.sampled_from([".".join(map(str, path)) for path in paths(load_config("tiny").model_dump())[1:]])


@settings(max_examples=100)
@given(st.lists(st.tuples(keys | st.text(max_size=8), values.map(repr) | st.text(max_size=8)), max_size=3))
def test_overrides_never_give_a_traceback(pairs: list[tuple[str, str]]) -> None:
    accepted_or_refused(SHORT, [f"{key}={value}" for key, value in pairs])


def test_changes_of_a_program_go_into_their_sections_and_name_their_argument() -> None:
    changes: dict[str, Any] = {
        "model": {"lora": {"rank": 3}, "scheduler": {"eta": 1}, "pretrained": Path("a") / "b"},
        "train": {"iterations": 2},
        "run": {"trackers": ()},
        "reward": [{"name": "embedded", "weight": 2.0}],
    }
    found = load_config("tiny", ["train.iterations=4"], [{"train": {"iterations": 1}}, changes])
    plain = load_config("tiny")
    assert (found.model.lora.rank, found.model.lora.alpha) == (3, plain.model.lora.alpha)
    assert (found.model.scheduler, found.model.pretrained) == ({"eta": 1}, "a/b")
    # what the command line says comes last, and other keys stay
    assert (found.train.iterations, found.train.learning_rate) == (4, plain.train.learning_rate)
    assert found.run.trackers == ()
    assert [(term.name, term.weight) for term in found.reward] == [("embedded", 2.0)]
    for wrong, reason in (
        (
            {"train": {"iterations": 0}},
            "argument train: train.iterations: found 0, allowed: a whole number >= 1",
        ),
        ({"train": 3}, "argument train: train: found 3, allowed: a mapping with the keys iterations"),
        (
            {"model": {"lora": {"rank": object()}}},
            "argument model: model.lora.rank: found an object of type object",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config("tiny", [], [wrong])
        assert str(caught.value).startswith(reason)


def test_settings_that_differ_are_named_with_both_values() -> None:
    before: dict[str, Any] = {"a": {"b": 1, "c": [1]}, "d": 2, "e": {}, "f": 0}
    now: dict[str, Any] = {"a": {"b": 3, "c": [1]}, "e": {"g": 4}, "f": 5}
    assert differences(before, now, ignored={"f"}) == [
        "a.b (was 1, is 3)",
        "d (was 2, is None)",
        "e.g (was None, is 4)",
    ]
    assert differences(before, before) == []
