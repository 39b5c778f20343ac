"""What ``loopfast eval --benchmark`` does: a run's model beside the one it was trained from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loopfast.config import Config
from loopfast.embedded.world import CATEGORIES as EMBEDDED_CATEGORIES
from loopfast.errors import ConfigError
from loopfast.evaluation.benchmark.categories import (
    IMAGES_PER_PROMPT,
    TITLES,
    embedded_benchmark,
    t2i_compbench,
)
from loopfast.evaluation.benchmark.metrics import with_metrics, with_options
from loopfast.evaluation.benchmark.results import summarize, write_results
from loopfast.evaluation.benchmark.run import Candidate, Category, Scope, run_benchmark
from loopfast.evaluation.models import RunModels, find_trained
from loopfast.policies import lora_weights
from loopfast.prompts.t2i_compbench import CATEGORIES as T2I_CATEGORIES
from loopfast.run.checkpoints import Checkpoint
from loopfast.run.console import Display

BENCHMARKS: dict[str, tuple[tuple[str, ...], Mapping[str, str]]] = {
    "t2i-compbench": (T2I_CATEGORIES, TITLES),
    "embedded": (EMBEDDED_CATEGORIES, {}),
}
"""Of each benchmark the categories, and the titles of its table's columns where they differ from these."""

# Keys of a configuration that change an image by rounding at most, or that a checkpoint's weights include.
_WITHOUT_EFFECT = {
    "model": {
        "device",
        "tune",
        "allow_pickle",
        "lora",
        "attention",
        "fast_layers",
        "channels_last",
        "shared_trunk",
        "compile",
        "tf32",
        "decoder_precision",
        "deterministic",
        "vae_tiling",
        "free_text_encoder",
    },
    "rollout": {
        "prompts_per_iteration",
        "microbatch",
        "stochastic_steps",
        "cuda_graph",
        "dtype",
        "device",
        "replica",
        "merge_lora",
        "reward_worker",
        "on_bad_reward",
    },
}


def evaluate_benchmark(
    target: Path,
    benchmark: str,
    *,
    pretrained: str | None = None,
    prompts_dir: Path | None,
    categories: Sequence[str],
    metrics: Sequence[str],
    metric_options: Sequence[str],
    images_per_prompt: int | None,
    limit_prompts: int | None,
    steps: int | None,
    eta: float | None,
    noise_level: float | None,
    guidance_scale: float | None,
    base: bool,
    keep_images: int,
    seed: int,
    output: Path | None,
    display: Display,
) -> tuple[dict[str, Any], Mapping[str, str]]:
    """Measures a run's newest good checkpoint, or an exported LoRA, and the model before training, on a benchmark.

    Args:
        target: the run's folder, or a LoRA's.
        benchmark: one of `BENCHMARKS`.
        pretrained: the base model of a LoRA; None: what its card says.
        prompts_dir: the folder of T2I-CompBench's prompt files.
        categories: of the benchmark; none: all.
        metrics, metric_options: see `loopfast.evaluation.benchmark.metrics`.
        images_per_prompt: None: 10.
        limit_prompts: only so many first prompts of each category; None: all.
        steps, eta, noise_level, guidance_scale: of the sampler; None: the run's.
        base: measure the model before training, too.
        keep_images: images of each prompt to keep as PNG files.
        seed: of the noise and of the bootstrap.
        output: the folder for scores and results; None: ``benchmarks/<benchmark>`` in the run's.
        display: where progress is shown.

    Returns:
        What `loopfast.evaluation.benchmark.results.summarize` gives, and the titles of the table's columns.

    Raises:
        ConfigError: an option, a file or a metric cannot be used, or the folder holds scores of other settings.
        CheckpointError: the run has no checkpoint that can be used.
        RewardError: a metric failed; what was scored before is kept.
    """
    if benchmark not in BENCHMARKS:
        raise ConfigError(f"--benchmark: found {benchmark!r}, allowed: {', '.join(BENCHMARKS)}")
    known, titles = BENCHMARKS[benchmark]
    for name in categories:
        if name not in known:
            raise ConfigError(
                f"--category: {benchmark} has no category {name!r}; allowed: {', '.join(known)}"
            )
    chosen = [name for name in known if name in categories or not categories]
    parts = with_options(with_metrics(_categories(benchmark, prompts_dir, chosen), metrics), metric_options)
    sampler = {"steps": steps, "eta": eta, "noise_level": noise_level, "guidance_scale": guidance_scale}
    config, checkpoint = find_trained(target, display, pretrained=pretrained)
    config = _with_sampler(config, **sampler)
    scope = Scope(images_per_prompt or IMAGES_PER_PROMPT, seed, limit_prompts, keep_images)
    folder = output or target / "benchmarks" / benchmark
    candidates = _candidates(config, target, checkpoint, base=base)
    scores = run_benchmark(candidates, parts, scope, folder, display)
    result = summarize(benchmark, candidates, parts, scope, scores)
    for file in write_results(result, titles, folder):
        display.message(f"written: {file}")
    return result, titles


def _categories(benchmark: str, prompts_dir: Path | None, names: Sequence[str]) -> list[Category]:
    if benchmark == "embedded":
        if prompts_dir is not None:
            raise ConfigError(
                "--prompts-dir belongs to --benchmark t2i-compbench; the embedded one has its own"
            )
        return embedded_benchmark(names)
    if prompts_dir is None:
        raise ConfigError("--benchmark t2i-compbench needs --prompts-dir, the folder of its prompt files")
    return t2i_compbench(prompts_dir, names)


def _with_sampler(config: Config, **changes: Any) -> Config:
    settings = {key: value for key, value in changes.items() if value is not None}
    return config.model_copy(update={"rollout": config.rollout.model_copy(update=settings)})


def _candidates(
    config: Config, target: Path, checkpoint: Checkpoint | None, *, base: bool
) -> list[Candidate]:
    common = {
        section: {
            key: value
            for key, value in getattr(config, section).model_dump(mode="json").items()
            if key not in without
        }
        for section, without in _WITHOUT_EFFECT.items()
    }
    if checkpoint is None:
        name, file = target.name, lora_weights(config.model)
    else:
        name, file = checkpoint.path.name, checkpoint.path / "manifest.json"
    weights = {"checkpoint": name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()[:16]}
    models = RunModels(config, checkpoint)
    trained = Candidate("trained", {**common, "weights": weights}, models.trained)
    return [Candidate("base", common, models.base), trained] if base else [trained]
