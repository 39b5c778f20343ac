"""Rules between keys: values that are each allowed, but not together."""

from __future__ import annotations

from collections.abc import Iterator

from loopfast.algorithms import ALGORITHMS
from loopfast.config.document import Document, KeyPath
from loopfast.config.messages import allowed_values, problem, schema_at
from loopfast.config.sections import Config, RolloutConfig

RESERVED_NAMES = ("mean", "std", "reward", "dropped_images")
"""Names that no reward may have: ``reward_mean`` and the like are metrics of the sum."""


def conflicts(config: Config) -> Iterator[tuple[KeyPath, str]]:
    """Yields each key whose value does not go with that of another key, and a message about it."""
    values = Document("", config.model_dump())
    for key, allowed in _broken_rules(config):
        path: KeyPath = tuple(int(part) if part.isdigit() else part for part in key.split("."))
        yield problem(path, values.value(path), allowed)
    if not config.reward:
        yield problem(("reward",), [], allowed_values(schema_at(("reward",))[1]))
    elif not any(term.weight for term in config.reward):
        yield problem(("reward", 0, "weight"), 0, "a weight other than 0 for at least one reward")


def _broken_rules(config: Config) -> Iterator[tuple[str, str]]:
    """Yields a key, and the values that the other keys allow for it."""
    algorithm = ALGORITHMS[config.algorithm.name]
    model, rollout, train = config.model, config.rollout, config.train
    samples = config.algorithm.samples_per_prompt
    if model.tune == "full" and model.lora.from_ is not None:
        merge = "`loopfast export --merge` writes the base model with a LoRA in it"
        yield "model.lora.from", f"null with model.tune: full; {merge}"
    if algorithm.needs_group and samples < 2:
        reason = "which compares the images of a prompt with each other"
        yield "algorithm.samples_per_prompt", f"2 or more with {algorithm.name}, {reason}"
    if algorithm.single_epoch and train.inner_epochs > 1:
        reason = "which does not limit how far a second pass would go"
        yield "train.inner_epochs", f"1 with {algorithm.name}, {reason}"
    if algorithm.clip_range is None and config.algorithm.clip_range is not None:
        yield "algorithm.clip_range", f"null with {algorithm.name}, which does not clip"
    if rollout.eta is not None and rollout.noise_level is not None:
        reason = "that is for a DDIM scheduler, this for a flow-matching one"
        yield "rollout.noise_level", f"null beside rollout.eta: {reason}"
    start, stop = _range(train.steps, rollout.steps)
    if not start < stop <= rollout.steps:
        yield "train.steps", f"a range with START < STOP inside 0:{rollout.steps} (rollout.steps)"
        start, stop = 0, rollout.steps
    wrong, stochastic = _stochastic(rollout, train.steps)
    if wrong:
        yield "rollout.stochastic_steps", wrong
    copied = [key for key in ("dtype", "device", "merge_lora") if getattr(rollout, key)]
    if copied and rollout.replica == "none":
        reason = f"rollout.{copied[0]}, which needs a copy of the denoiser"
        yield "rollout.replica", f"auto, resident or gathered beside {reason}"
    if rollout.replica == "gathered" and rollout.merge_lora:
        yield "rollout.replica", "auto or resident with rollout.merge_lora, which changes a lasting copy"
    yield from _distributed(config)
    if model.lora.text_encoder and model.free_text_encoder:
        reason = "an encoder that is trained is needed to the end"
        yield "model.free_text_encoder", f"false with model.lora.text_encoder: {reason}"
    if rollout.merge_lora and model.lora.dora:
        yield "rollout.merge_lora", "false with model.lora.dora, which is no sum of weights"
    if rollout.merge_lora and model.tune != "lora":
        yield "rollout.merge_lora", "false with model.tune: full, which has no adapter"
    trained = min(stop - start, stochastic)
    per_trajectory = train.trained_per_trajectory(trained)
    if per_trajectory < 1:
        reason = f"with which one of {trained} trained steps is drawn"
        yield "train.step_fraction", f"at least {0.5 / trained:.3g}, {reason}"
    pairs = rollout.prompts_per_iteration * samples * max(1, per_trajectory)
    if pairs < train.updates_per_iteration:
        reason = "the number of (image, step) pairs in an iteration"
        yield "train.updates_per_iteration", f"at most {pairs}, {reason}"
    if model.channels_last == "on" and model.tune == "full" and train.optimizer == "adamw_8bit":
        reason = "bitsandbytes would lay the weights out anew"
        yield "train.optimizer", f"adamw with model.channels_last: {reason}"
    if model.decoder_precision == "float32" and model.tf32:
        reason = "which holds for the whole process"
        yield "model.decoder_precision", f"auto, tf32 or model with model.tf32, {reason}"
    if train.screening == "on" and config.algorithm.kl_weight > 0:
        reason = "which gives every pair a gradient"
        yield "train.screening", f"auto or off with algorithm.kl_weight above 0, {reason}"
    if train.screening == "on" and algorithm.clip_range is None:
        yield "train.screening", f"auto or off with algorithm.name {algorithm.name}, which does not clip"
    yield from _reward_terms(config)


def _reward_terms(config: Config) -> Iterator[tuple[str, str]]:
    titles = [term.title for term in config.reward]
    for index, term in enumerate(config.reward):
        name = f"reward.{index}.{'name' if term.label is None else 'label'}"
        if term.title in titles[:index]:
            yield name, "each reward once; a second one of that name needs a label of its own"
        if term.title in RESERVED_NAMES:
            yield name, f"none of {', '.join(RESERVED_NAMES)}, which metrics have"
        if term.normalize == "range" and term.range is None:
            yield f"reward.{index}.range", "two numbers, the lower first, with normalize: range"
        elif term.range is not None and not (len(term.range) == 2 and term.range[0] < term.range[1]):
            yield f"reward.{index}.range", "two numbers, the lower first"
        elif term.range is not None and term.normalize != "range":
            yield f"reward.{index}.range", "null without normalize: range"


def _distributed(config: Config) -> Iterator[tuple[str, str]]:
    stage, offload, lora = config.distributed.zero_stage, config.distributed.offload, config.model.lora
    least = {"none": 0, "optimizer": 1, "all": 3}[offload]
    if stage < least:
        yield "distributed.zero_stage", f"{least} or more with distributed.offload: {offload}"
    if stage and config.train.optimizer != "adamw":
        reason = "whose parts of moments have no 8-bit blocks"
        yield "train.optimizer", f"adamw with distributed.zero_stage above 0, {reason}"
    if stage and config.train.ema_decay is not None:
        reason = "where no process has all the weights to average"
        yield "train.ema_decay", f"null with distributed.zero_stage above 0, {reason}"
    for key, used in (("dora", lora.dora), ("text_encoder", lora.text_encoder)):
        if stage == 3 and config.model.tune == "lora" and used:
            reason = "which gathers the weights of one network's layers"
            yield f"model.lora.{key}", f"false with distributed.zero_stage: 3, {reason}"
    if stage == 3 and config.model.compile != "off":
        yield "model.compile", "off with distributed.zero_stage: 3, which gathers weights between layers"


def _stochastic(rollout: RolloutConfig, train_steps: str) -> tuple[str | None, int]:
    """Returns the values that are allowed for a wrong ``rollout.stochastic_steps``, or None if it is right.

    The second result is the largest number of steps that it leaves for training.
    """
    steps, spec = rollout.steps, rollout.stochastic_steps
    start, stop = _range(train_steps, steps)
    if spec == "all":
        return None, steps
    if spec.startswith("window:"):
        width, room = int(spec.removeprefix("window:")), stop - start
        if width > room:
            key = "rollout.steps" if room == steps else "train.steps"
            return f"a window of at most {room} steps, the number that {key} selects", steps
        return None, width
    first, last = _range(spec, steps)
    if not 0 <= first < last <= steps:
        return f"a range with START < STOP inside 0:{steps} (rollout.steps)", steps
    common = min(last, stop) - max(first, start)
    if common < 1:
        return f"a range that shares a step with train.steps, {train_steps}: others are not trained on", steps
    return None, common


def _range(spec: str, steps: int) -> tuple[int, int]:
    """Returns the numbers of ``START:STOP``; the range of all steps if ``spec`` is a word."""
    start, _, stop = spec.partition(":") if ":" in spec else ("", "", "")
    return int(start or 0), int(stop or steps)
