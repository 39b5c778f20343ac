"""Time to reward: the time after which each trainer, at its best settings, has a model with a given held-out reward."""

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
    """Returns ``DDPOConfig`` for one of `TRL_SWEEP`: TRL's defaults, except for the batch sizes and the setting's own
    keys.
    """
    config = trl_config(REWARD_WORK, batches, seed=seed)
    return {**config, **TRL_SWEEP[name]}


def loopfast_settings(name: str, recipe: Mapping[str, Any], seed: int) -> Json:
    """Returns our configuration: the recipe at the evaluation's guidance, with the setting's changes.

    Args:
        name: a name of `LOOPFAST_SWEEP`.
        recipe: the recipe `tiny`, with all its keys.
        seed: the run's seed.
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
    """Runs towards a reward and their evaluations, kept in a folder so that an interrupted race can continue.

    Args:
        folder: a folder below the race's.
        prompts: TRL's prompts, the texts of `PROMPTS`.
        recipe: the recipe `tiny`, with all its keys.
        recipe_steps: the number of transitions that it trains on.
        batches: TRL's batch sizes.
        threads: the number of threads of both.
        fresh: ignore earlier runs.
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
        """Returns the rows that the model sees in an iteration of a setting."""
        if trainer == "trl":
            return trl_rows(trl_settings(name, self._batches, 0))
        return loopfast_rows(loopfast_settings(name, self._recipe, 0), self._steps)

    def train(
        self, trainer: str, name: str, seed: int, *, iterations: int, every: int, seconds: float | None = None
    ) -> list[Json]:
        """Trains, or uses an existing result of the same run.

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
        """Returns the seconds of each iteration of a separate run with this number of iterations."""
        folder = self._folder / "pace" / f"{trainer}-{_slug(name)}"
        shutil.rmtree(folder, ignore_errors=True)
        job = self._job(trainer, name, 0, folder, iterations=iterations, every=iterations, seconds=None)
        run = run_worker(f"{trainer}_worker", job, folder, self._threads)
        return [iteration["seconds"] for iteration in run["iterations"]]

    def evaluate(self, name: str, files: Sequence[str], prompts: str, images: int, guidance: float) -> Json:
        """Returns held-out or validation rewards of weights, one list for each."""
        job = evaluation_job(files, [guidance], prompts, images_per_prompt=images)
        folder = self._folder / "evaluations" / f"{_slug(name)}-{guidance:g}"
        found = run_worker("judge", job, folder, self._threads, reuse=True)["evaluations"]
        return [entry[f"{guidance:g}"] for entry in found]


def _slug(name: str) -> str:
    return "".join(character if character.isalnum() or character in ".-" else "-" for character in name)


def sweep(field: Field, budget: int, trainers: Sequence[str], say: Say) -> Json:
    """Tries every setting for as many model rows as `budget` default iterations of TRL's need.

    Args:
        field: the runs' folder and settings.
        budget: iterations of TRL's at its defaults.
        trainers: ``trl``, ``loopfast`` or both.
        say: shows a line of progress.

    Returns:
        The results' section ``sweep``: for each trainer the settings with their curves on the validation prompts, and
        the chosen one, which has the best reward at the end.
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
    """Measures the seconds of an iteration of either trainer with its setting, on a quiet machine: the median after a
    warm-up.

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
    """Trains both with several seeds, in turn, then evaluates all exported weights.

    Args:
        field: the runs' folder and settings.
        chosen: each trainer's setting.
        paces: the result of :func:`pace`; then runs have as many iterations as fit the times at these paces, and an
            iteration counts as long as its pace, whatever else the machine did. With None the clock decides.
        iterations: with `paces`, each trainer's iterations if more than fit were trained; the others are not evaluated.
        seeds: the number of seeds.
        trl_seconds: TRL's training time.
        loopfast_seconds: our training time, at most.
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
                    points = points[1::2] or points  # an additional result, at half the cost
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
