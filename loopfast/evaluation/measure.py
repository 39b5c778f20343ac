"""The command ``loopfast eval``: it measures a run's newest checkpoint by the run's own rewards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from loopfast.evaluation.evaluate import evaluate
from loopfast.evaluation.models import find_trained, policy_of, sampler_of, warn_of_cut
from loopfast.prompts import Prompt, load_prompts
from loopfast.rewards import Scores, build_rewards
from loopfast.run.console import Display
from loopfast.system.files import writing


def evaluate_checkpoint(
    target: Path,
    *,
    pretrained: str | None = None,
    prompts: str | None,
    images_per_prompt: int | None,
    seed: int,
    output: Path | None,
    display: Display,
) -> dict[str, Any]:
    """Measures the newest good checkpoint of a run, or an exported LoRA, with the run's own rewards and sampler.

    Args:
        target: the run's folder, or that of a LoRA with the run's recipe on its card.
        pretrained: the base model of a LoRA; None stands for the one that its card names.
        prompts: the source of the prompts; None stands for those of the run's evaluations.
        images_per_prompt: the number of images; None stands for that of the run's evaluations.
        output: the file for the result as JSON. None writes nothing.

    Returns:
        ``reward``, ``parts``, ``by_category`` and ``items``, as in a run's ``evaluation/*.json``.

    Raises:
        ConfigError: the folder is neither a run's nor a LoRA's with a recipe.
        CheckpointError: the run has no checkpoint that can be used.
        RewardError: a reward failed.
    """
    config, checkpoint = find_trained(target, display, pretrained=pretrained, recipe=True)
    source = load_prompts(prompts or config.evaluation.prompts or config.prompts.source)
    rewards = build_rewards(config.reward)
    sampler = sampler_of(config, policy_of(config, checkpoint))
    warn_of_cut(sampler, [prompt.text for prompt in source], display)
    changes: dict[str, int | None] = {"seed": seed, "preview_images": 0}
    if prompts:
        changes["limit_prompts"] = None
    if images_per_prompt is not None:
        changes["images_per_prompt"] = images_per_prompt
    settings = config.evaluation.model_copy(update=changes)

    def score(images: Tensor, batch: Sequence[Prompt]) -> Scores:
        return rewards.score(images, [p.text for p in batch], [p.metadata for p in batch])

    result = evaluate(sampler, source, score, settings).as_dict()
    if output is not None:
        with writing(output.parent):
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(result, indent=1), encoding="utf-8")
        display.message(f"scores of {len(result['items'])} images written to {output}")
    return result
