"""The command ``loopfast benchmark``: it measures a run's model and the model before training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopfast.config import Config, RewardConfig
from loopfast.embedded.world import CATEGORIES as EMBEDDED_CATEGORIES
from loopfast.errors import ConfigError
from loopfast.evaluation.benchmark.categories import t2i_compbench
from loopfast.evaluation.benchmark.metrics import with_metrics, with_options
from loopfast.evaluation.benchmark.results import summarize, write_results
from loopfast.evaluation.benchmark.run import Category, MeasuredModel, SamplingPlan, run_benchmark
from loopfast.evaluation.models import RunModels, find_trained, with_rollout
from loopfast.policies import lora_weights
from loopfast.prompts import load_prompts
from loopfast.prompts.t2i_compbench import CATEGORIES as T2I_CATEGORIES
from loopfast.run.checkpoints import Checkpoint
from loopfast.run.console import Display

BENCHMARKS = {"t2i-compbench": T2I_CATEGORIES, "embedded": EMBEDDED_CATEGORIES}
"""Each benchmark's categories."""

# Keys of a configuration that change an image by rounding at most, or whose effect is in a checkpoint's weights.
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


@dataclass(frozen=True)
class BenchmarkChoice:
    """A benchmark, the categories of it to measure, and the metrics to measure them by.

    Attributes:
        name: one of `BENCHMARKS`.
        prompts_dir: the folder of T2I-CompBench's prompt files.
        categories: their names; none stands for all.
        metrics, metric_options: see `loopfast.evaluation.benchmark.metrics`.
    """

    name: str
    prompts_dir: Path | None = None
    categories: Sequence[str] = ()
    metrics: Sequence[str] = ()
    metric_options: Sequence[str] = ()

    def load(self) -> list[Category]:
        """Reads the prompts of the categories.

        Raises:
            ConfigError: a name, a file or a metric cannot be used.
        """
        if self.name not in BENCHMARKS:
            raise ConfigError(f"--benchmark: found {self.name!r}, allowed: {', '.join(BENCHMARKS)}")
        known = BENCHMARKS[self.name]
        for name in self.categories:
            if name not in known:
                raise ConfigError(
                    f"--category: {self.name} has no category {name!r}; allowed: {', '.join(known)}"
                )
        names = [name for name in known if name in self.categories or not self.categories]
        if self.name == "embedded":
            if self.prompts_dir is not None:
                raise ConfigError(
                    "--prompts-dir belongs to t2i-compbench; the embedded benchmark has its own"
                )
            detector = RewardConfig(name="embedded")
            found = [Category(name, load_prompts(f"embedded:{name}-heldout"), detector) for name in names]
        elif self.prompts_dir is None:
            raise ConfigError("t2i-compbench needs --prompts-dir, the folder of its prompt files")
        else:
            found = t2i_compbench(self.prompts_dir, names)
        return with_options(with_metrics(found, self.metrics), self.metric_options)


def evaluate_benchmark(
    target: Path,
    choice: BenchmarkChoice,
    plan: SamplingPlan,
    *,
    pretrained: str | None = None,
    base: bool = True,
    output: Path | None = None,
    display: Display,
    **rollout: float | None,
) -> dict[str, Any]:
    """Measures a run's newest good checkpoint, or an exported LoRA, and the model before training, on a benchmark.

    Args:
        pretrained: the base model of a LoRA; None stands for the one that its card names.
        base: measure the model before training, too.
        output: the folder for scores and results; None stands for ``benchmarks/<name>`` in the run's folder.
        rollout: keys of the section ``rollout``; None stands for the run's setting.

    Returns:
        The result of `loopfast.evaluation.benchmark.results.summarize`.

    Raises:
        ConfigError: an option, a file or a metric cannot be used, or the folder holds scores of other settings.
        CheckpointError: the run has no checkpoint that can be used.
        RewardError: a metric failed; what was scored before is kept.
    """
    categories = choice.load()
    config, checkpoint = find_trained(target, display, pretrained=pretrained)
    config = with_rollout(config, **rollout)
    folder = output or target / "benchmarks" / choice.name
    models = _models(config, target, checkpoint, base=base)
    scores = run_benchmark(models, categories, plan, folder, display)
    result = summarize(choice.name, models, categories, plan, scores)
    for file in write_results(result, folder):
        display.message(f"written: {file}")
    return result


def _models(
    config: Config, target: Path, checkpoint: Checkpoint | None, *, base: bool
) -> list[MeasuredModel]:
    common = {
        section: getattr(config, section).model_dump(mode="json", exclude=without)
        for section, without in _WITHOUT_EFFECT.items()
    }
    if checkpoint is None:
        name, file = target.name, lora_weights(config.model)
    else:
        name, file = checkpoint.path.name, checkpoint.path / "manifest.json"
    weights = {"checkpoint": name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()[:16]}
    samplers = RunModels(config, checkpoint)
    trained = MeasuredModel("trained", {**common, "weights": weights}, samplers.trained)
    return [MeasuredModel("base", common, samplers.base), trained] if base else [trained]
