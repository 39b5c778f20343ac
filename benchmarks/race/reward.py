"""Time to reward: how soon each trainer, at its best settings, has a model of a certain held-out reward."""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .figures import mean_curve, time_to_reward
from .jobs import BUILD, EMBEDDED, RaceError, evaluation_job, loopfast_job, run_worker, trl_job
from .settings import (
    EVALUATION_GUIDANCE,
    LOOPFAST_SWEEP,
    REWARD_WORK,
    TRL_SWEEP,
    Json,
    best,
    iterations_for,
    loopfast_rows,
    merged,
    trl_config,
    trl_rows,
)

Say = Callable[[str], None]

PROMPTS, VALIDATION, HELD_OUT = "embedded:color", "embedded:color-validation", "embedded:color-heldout"
VALIDATION_IMAGES, HELD_OUT_IMAGES = 10, 4
SWEEP_EXPORTS = 5
"""Points of a setting's curve in the sweep."""

TRL_EXPORT_EVERY, LOOPFAST_EXPORT_EVERY = 10, 8
PACED = 5
"""Iterations whose median is a trainer's pace."""

SIDE_GUIDANCE = 1.0
"""The trained models are also measured without guidance."""

BASE = EMBEDDED / "unet" / "diffusion_pytorch_model.safetensors"


def trl_settings(name: str, batches: tuple[int, int], seed: int) -> Json:
    """``DDPOConfig`` of one of `TRL_SWEEP`: TRL's defaults but for the batch sizes and what the setting names."""
    config = trl_config(REWARD_WORK, batches, seed=seed)
    return {**config, **TRL_SWEEP[name]}


def loopfast_settings(name: str, recipe: Mapping[str, Any], seed: int) -> Json:
    """A configuration of ours: the recipe at the evaluation's guidance, and what the setting changes.

    Args:
        name: of `LOOPFAST_SWEEP`.
        recipe: the recipe `tiny`, with all its keys.
        seed: of the run.
    """
    common = {
        "run": {"seed": seed},
        "model": {"pretrained": str(EMBEDDED)},
        "reward": [{"name": "embedded"}],
        "rollout": {"guidance_scale": EVALUATION_GUIDANCE},
        "evaluation": {"every": 0, "limit_prompts": 1, "images_per_prompt": 1, "preview_images": 0},
    }
    return merged(merged(recipe, common), LOOPFAST_SWEEP[name])


class Field:
    """Runs towards a reward and their evaluations, kept in a folder so that an interrupted race goes on.

    Args:
        folder: below the race's.
        prompts: TRL's, the texts of `PROMPTS`.
        recipe: the recipe `tiny`, with all its keys.
        recipe_steps: transitions it trains on.
        batches: TRL's batch sizes.
        threads: of both.
        fresh: forget earlier runs.
    """

    def __init__(
        self,
        folder: str,
        prompts: Sequence[str],
        recipe: Mapping[str, Any],
        recipe_steps: int,
        batches: tuple[int, int],
        threads: int,
        fresh: bool,
    ) -> None:
        self._folder = BUILD / folder
        self._prompts, self._recipe, self._steps = prompts, recipe, recipe_steps
        self._batches, self._threads = batches, threads
        if fresh:
            shutil.rmtree(self._folder, ignore_errors=True)

    def rows(self, trainer: str, name: str) -> float:
        """Rows an iteration of a setting asks of the model."""
        if trainer == "trl":
            return trl_rows(trl_settings(name, self._batches, 0))
        return loopfast_rows(loopfast_settings(name, self._recipe, 0), self._steps)

    def train(
        self, trainer: str, name: str, seed: int, *, iterations: int, every: int, seconds: float | None = None
    ) -> list[Json]:
        """Train, or take what is there of the same run.

        Returns:
            The exported weights: ``iteration``, ``seconds`` and ``file`` of each.
        """
        folder = self._folder / trainer / f"{_slug(name)}-seed-{seed}"
        job = self._job(trainer, name, seed, folder, iterations=iterations, every=every, seconds=seconds)
        return run_worker(f"{trainer}_worker", job, folder, self._threads, reuse=True)["exports"]

    def _job(
        self,
        trainer: str,
        name: str,
        seed: int,
        folder: Path,
        *,
        iterations: int,
        every: int,
        seconds: float | None,
    ) -> Json:
        if trainer == "trl":
            export = folder / "weights"
            export.mkdir(parents=True, exist_ok=True)
            return trl_job(
                REWARD_WORK,
                trl_settings(name, self._batches, seed),
                self._prompts,
                iterations=iterations,
                repeat=None,
                seconds=seconds,
                export=export,
                export_every=every,
            )
        config = loopfast_settings(name, self._recipe, seed)
        return loopfast_job(config, folder / "run", iterations=iterations, seconds=seconds, checkpoints=every)

    def times(self, trainer: str, name: str, iterations: int) -> list[float]:
        """Seconds of each of as many iterations of a run of its own."""
        folder = self._folder / "pace" / f"{trainer}-{_slug(name)}"
        shutil.rmtree(folder, ignore_errors=True)
        job = self._job(trainer, name, 0, folder, iterations=iterations, every=iterations, seconds=None)
        run = run_worker(f"{trainer}_worker", job, folder, self._threads)
        return [iteration["seconds"] for iteration in run["iterations"]]

    def evaluate(self, name: str, files: Sequence[str], prompts: str, images: int, guidance: float) -> Json:
        """Held-out or validation rewards of weights, a list."""
        job = evaluation_job(files, [guidance], prompts, images_per_prompt=images)
        folder = self._folder / "evaluations" / f"{_slug(name)}-{guidance:g}"
        found = run_worker("judge", job, folder, self._threads, reuse=True)["evaluations"]
        return [entry[f"{guidance:g}"] for entry in found]


def _slug(name: str) -> str:
    return "".join(character if character.isalnum() or character in ".-" else "-" for character in name)


def sweep(field: Field, budget: int, trainers: Sequence[str], say: Say) -> Json:
    """Try every setting for as many model rows as `budget` default iterations of TRL's take.

    Args:
        field: where the runs are.
        budget: iterations of TRL's at its defaults.
        trainers: ``trl``, ``loopfast`` or both.
        say: shows a line of progress.

    Returns:
        The results' section ``sweep``: for each trainer the settings with their curves on the validation prompts, and
        the one chosen, by the reward at the end.
    """
    rows = budget * field.rows("trl", "lr 1e-4")
    found: Json = {}
    for trainer in trainers:
        entries = []
        for name in TRL_SWEEP if trainer == "trl" else LOOPFAST_SWEEP:
            iterations = iterations_for(rows, field.rows(trainer, name))
            every = max(1, iterations // SWEEP_EXPORTS)
            exports = field.train(trainer, name, 0, iterations=iterations, every=every)
            files = [export["file"] for export in exports]
            rewards = field.evaluate(
                f"{trainer}-{name}", files, VALIDATION, VALIDATION_IMAGES, EVALUATION_GUIDANCE
            )
            curve = [[e["iteration"], r["reward"]] for e, r in zip(exports, rewards, strict=True)]
            entries.append({"name": name, "iterations": iterations, "curve": curve, "reward": curve[-1][1]})
            say(f"  {trainer}, {name}: {curve[-1][1]:.3f} after {iterations} iterations")
        found[trainer] = {
            "settings": entries,
            "chosen": best(entries, "reward", largest=True)["name"],
            "rows": rows,
        }
    return found


def pace(field: Field, chosen: Mapping[str, str], say: Say) -> Json:
    """Seconds an iteration of either trainer takes at its setting, on a quiet machine: the median after a warm-up.

    Returns:
        The results' section ``pace``: each trainer's setting and seconds.
    """
    found: Json = {}
    for trainer, name in chosen.items():
        times = field.times(trainer, name, 1 + PACED)[1:]
        found[trainer] = {"name": name, "seconds": statistics.median(times), "iterations": len(times)}
        say(f"  {trainer}, {name}: {found[trainer]['seconds']:.2f} s an iteration")
    return found


def race_to_reward(
    field: Field,
    chosen: Mapping[str, str],
    *,
    paces: Mapping[str, Json] | None = None,
    iterations: Mapping[str, int] | None = None,
    seeds: int,
    trl_seconds: float,
    loopfast_seconds: float,
    say: Say,
) -> Json:
    """Train both with several seeds, in turn, then evaluate everything they exported.

    Args:
        field: where the runs are.
        chosen: each trainer's setting.
        paces: of :func:`pace`; then runs are as many iterations as fit the times at these, and an iteration counts
            as long, whatever else the machine did. None: the clock decides.
        iterations: with `paces`, each trainer's, where more than fit were trained; the rest is not looked at.
        seeds: how many.
        trl_seconds: TRL's training time.
        loopfast_seconds: ours, at most.
        say: shows a line of progress.

    Returns:
        The results' section ``time_to_reward``.
    """
    exports: dict[str, list[list[Json]]] = {"trl": [], "loopfast": []}
    for seed in range(seeds):
        for trainer, seconds, every in (
            ("trl", trl_seconds, TRL_EXPORT_EVERY),
            ("loopfast", loopfast_seconds, LOOPFAST_EXPORT_EVERY),
        ):
            say(f"  {trainer}, seed {seed}: {chosen[trainer]}, {seconds:.0f} s")
            if paces is None:
                exports[trainer].append(
                    field.train(
                        trainer, chosen[trainer], seed, iterations=10_000, every=every, seconds=seconds
                    )
                )
                continue
            each = paces[trainer]["seconds"]
            fitting = math.ceil(seconds / each)
            count = fitting if iterations is None else iterations[trainer]
            if count < fitting:
                raise RaceError(
                    f"{trainer}: {fitting} iterations fit {seconds:.0f} s, and {count} were asked for"
                )
            made = field.train(trainer, chosen[trainer], seed, iterations=count, every=every)
            exports[trainer].append(
                [{**e, "seconds": e["iteration"] * each} for e in made if e["iteration"] <= fitting]
            )

    def rewards(name: str, files: Sequence[str], guidance: float) -> list[float]:
        say(f"  evaluating {name}: {len(files)} models at guidance {guidance:g}")
        found = field.evaluate(name, files, HELD_OUT, HELD_OUT_IMAGES, guidance)
        return [entry["reward"] for entry in found]

    figures, base = {}, {}
    for guidance in (EVALUATION_GUIDANCE, SIDE_GUIDANCE):
        (base[f"{guidance:g}"],) = rewards("base", [str(BASE)], guidance)
        curves: dict[str, list[list[tuple[float, float]]]] = {}
        for trainer, of_seeds in exports.items():
            curves[trainer] = []
            for seed, points in enumerate(of_seeds):
                if guidance != EVALUATION_GUIDANCE:
                    points = points[1::2] or points  # a look aside, at half the cost
                values = rewards(f"{trainer}-seed-{seed}", [point["file"] for point in points], guidance)
                curves[trainer].append(
                    [(p["seconds"], value) for p, value in zip(points, values, strict=True)]
                )
        found = time_to_reward(curves["trl"], curves["loopfast"])
        figures[f"{guidance:g}"] = {**found, "curves": curves}
    return {
        "primary": f"{EVALUATION_GUIDANCE:g}",
        "figures": figures,
        "base": base,
        "chosen": dict(chosen),
        "paces": None if paces is None else dict(paces),
        "seeds": seeds,
        "trl_budget": trl_seconds,
        "loopfast_budget": loopfast_seconds,
        "last": {
            trainer: mean_curve(figures[f"{EVALUATION_GUIDANCE:g}"]["curves"][trainer])[-1]
            for trainer in exports
        },
        "images": HELD_OUT_IMAGES,
    }
