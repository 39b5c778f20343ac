"""What keys that are each right may not be together."""

from __future__ import annotations

from collections.abc import Iterator

from loopfast.algorithms import ALGORITHMS
from loopfast.config.document import KeyPath
from loopfast.config.messages import allowed_values, problem, schema_at
from loopfast.config.sections import Config, RolloutConfig, TrainConfig


def conflicts(config: Config) -> Iterator[tuple[KeyPath, str]]:
    """What is wrong between keys that are each right."""
    algorithm = ALGORITHMS[config.algorithm.name]
    samples = config.algorithm.samples_per_prompt
    rollout, train = config.rollout, config.train
    if config.model.tune == "full" and config.model.lora.from_ is not None:
        allowed = (
            "null with model.tune: full; `loopfast export --merge` writes the base model with a LoRA in it"
        )
        yield problem(("model", "lora", "from"), config.model.lora.from_, allowed)
    if algorithm.needs_group and samples < 2:
        allowed = f"2 or more with {algorithm.name}, which compares the images of a prompt with each other"
        yield problem(("algorithm", "samples_per_prompt"), samples, allowed)
    if algorithm.single_epoch and train.inner_epochs > 1:
        allowed = f"1 with {algorithm.name}, which has no bound on how far a second pass would go"
        yield problem(("train", "inner_epochs"), train.inner_epochs, allowed)
    if algorithm.clip_range is None and config.algorithm.clip_range is not None:
        allowed = f"null with {algorithm.name}, which does not clip"
        yield problem(("algorithm", "clip_range"), config.algorithm.clip_range, allowed)
    if rollout.eta is not None and rollout.noise_level is not None:
        allowed = "null beside rollout.eta: that is for a DDIM scheduler, this for a flow-matching one"
        yield problem(("rollout", "noise_level"), rollout.noise_level, allowed)
    trained = rollout.steps
    if ":" in train.steps:
        start, stop = train.steps.split(":")
        trained = int(stop or rollout.steps) - int(start or 0)
        if trained < 1 or int(stop or 0) > rollout.steps:
            allowed = f"a range with START < STOP inside 0:{rollout.steps} (rollout.steps)"
            yield problem(("train", "steps"), train.steps, allowed)
            trained = rollout.steps
    trained = min(trained, _stochastic(rollout, train)[1])
    for message in _stochastic(rollout, train)[0]:
        yield problem(("rollout", "stochastic_steps"), rollout.stochastic_steps, message)
    wanted = [
        key
        for key, value in (
            ("dtype", rollout.dtype),
            ("device", rollout.device),
            ("merge_lora", rollout.merge_lora),
        )
        if value not in (None, False)
    ]
    if rollout.replica == "none" and wanted:
        allowed = f"auto, resident or gathered beside rollout.{wanted[0]}, which needs a copy of the denoiser"
        yield problem(("rollout", "replica"), "none", allowed)
    if rollout.replica == "gathered" and rollout.merge_lora:
        allowed = "auto or resident with rollout.merge_lora, which changes a copy that is there"
        yield problem(("rollout", "replica"), "gathered", allowed)
    yield from _distributed(config)
    if config.model.lora.text_encoder and config.model.free_text_encoder:
        allowed = "false with model.lora.text_encoder: an encoder that is trained is needed to the end"
        yield problem(("model", "free_text_encoder"), True, allowed)
    if rollout.merge_lora and config.model.lora.dora:
        yield problem(
            ("rollout", "merge_lora"), True, "false with model.lora.dora, which is no sum of weights"
        )
    if rollout.merge_lora and config.model.tune != "lora":
        yield problem(("rollout", "merge_lora"), True, "false with model.tune: full, which has no adapter")
    per_trajectory = train.trained_per_trajectory(trained)
    if per_trajectory < 1:
        allowed = f"at least {0.5 / trained:.3g}, with which one of {trained} trained steps is drawn"
        yield problem(("train", "step_fraction"), train.step_fraction, allowed)
    pairs = rollout.prompts_per_iteration * samples * max(1, per_trajectory)
    if pairs < train.updates_per_iteration:
        allowed = f"at most {pairs}, the number of (image, step) pairs in an iteration"
        yield problem(("train", "updates_per_iteration"), train.updates_per_iteration, allowed)
    if config.model.channels_last == "on" and config.model.tune == "full" and train.optimizer == "adamw_8bit":
        allowed = "adamw with model.channels_last: bitsandbytes would lay the weights out anew"
        yield problem(("train", "optimizer"), train.optimizer, allowed)
    if config.model.decoder_precision == "float32" and config.model.tf32:
        allowed = "auto, tf32 or model with model.tf32, which is for all of a process"
        yield problem(("model", "decoder_precision"), "float32", allowed)
    if train.screening == "on" and config.algorithm.kl_weight > 0:
        allowed = "auto or off with algorithm.kl_weight above 0, which gives every pair a gradient"
        yield problem(("train", "screening"), "on", allowed)
    if train.screening == "on" and algorithm.clip_range is None:
        allowed = f"auto or off with algorithm.name {algorithm.name}, which does not clip"
        yield problem(("train", "screening"), "on", allowed)
    yield from _reward_terms(config)
    if not config.reward:
        yield problem(("reward",), [], allowed_values(schema_at(("reward",))[1]))
    elif not any(term.weight for term in config.reward):
        yield problem(("reward", 0, "weight"), 0, "a weight other than 0 for at least one reward")


def _reward_terms(config: Config) -> Iterator[tuple[KeyPath, str]]:
    """What is wrong within and between the terms of the reward."""
    titles = [term.title for term in config.reward]
    for index, term in enumerate(config.reward):
        key = "name" if term.label is None else "label"
        if term.title in titles[:index]:
            allowed = "each reward once; a second one of that name needs a label of its own"
            yield problem(("reward", index, key), term.title, allowed)
        if term.title in TAKEN:
            allowed = f"none of {', '.join(TAKEN)}, which metrics have"
            yield problem(("reward", index, key), term.title, allowed)
        if term.normalize == "range" and term.range is None:
            allowed = "two numbers, the lower first, with normalize: range"
            yield problem(("reward", index, "range"), None, allowed)
        elif term.range is not None and not (len(term.range) == 2 and term.range[0] < term.range[1]):
            yield problem(("reward", index, "range"), list(term.range), "two numbers, the lower first")
        elif term.range is not None and term.normalize != "range":
            yield problem(("reward", index, "range"), list(term.range), "null without normalize: range")


TAKEN = ("mean", "std", "reward", "dropped_images")
"""Names that no reward may have: ``reward_mean`` and the like are metrics of the sum."""


def _distributed(config: Config) -> Iterator[tuple[KeyPath, str]]:
    """What is wrong between ``distributed`` and other keys."""
    distributed = config.distributed
    least = {"none": 0, "optimizer": 1, "all": 3}[distributed.offload]
    if distributed.zero_stage < least:
        allowed = f"{least} or more with distributed.offload: {distributed.offload}"
        yield problem(("distributed", "zero_stage"), distributed.zero_stage, allowed)
    if distributed.zero_stage and config.train.optimizer != "adamw":
        allowed = "adamw with distributed.zero_stage above 0, whose parts of moments have no 8-bit blocks"
        yield problem(("train", "optimizer"), config.train.optimizer, allowed)
    if distributed.zero_stage and config.train.ema_decay is not None:
        allowed = (
            "null with distributed.zero_stage above 0, where no process has all the weights it would follow"
        )
        yield problem(("train", "ema_decay"), config.train.ema_decay, allowed)
    for key in ("dora", "text_encoder"):
        if distributed.zero_stage == 3 and config.model.tune == "lora" and getattr(config.model.lora, key):
            allowed = (
                "false with distributed.zero_stage: 3, which gathers the weights of one network's layers"
            )
            yield problem(("model", "lora", key), True, allowed)
    if distributed.zero_stage == 3 and config.model.compile != "off":
        allowed = "off with distributed.zero_stage: 3, which gathers weights between layers"
        yield problem(("model", "compile"), config.model.compile, allowed)


def _stochastic(rollout: RolloutConfig, train: TrainConfig) -> tuple[list[str], int]:
    """What is wrong with ``rollout.stochastic_steps``, and at most how many steps it leaves to train on."""
    steps, spec = rollout.steps, rollout.stochastic_steps
    start, stop = _range(train.steps, steps)
    if spec == "all":
        return [], steps
    if spec.startswith("window:"):
        width, room = int(spec.removeprefix("window:")), stop - start
        if width > room:
            key = "rollout.steps" if room == steps else "train.steps"
            return [f"a window of at most {room} steps, the number that {key} selects"], steps
        return [], width
    first, last = _range(spec, steps)
    if not 0 <= first < last <= steps:
        return [f"a range with START < STOP inside 0:{steps} (rollout.steps)"], steps
    common = min(last, stop) - max(first, start)
    if common < 1:
        return [
            f"a range that shares a step with train.steps, {train.steps}: others are not trained on"
        ], steps
    return [], common


def _range(spec: str, steps: int) -> tuple[int, int]:
    """``START:STOP`` as numbers; all steps where it names none."""
    start, _, stop = spec.partition(":") if ":" in spec else ("", "", "")
    return int(start or 0), int(stop or steps)
