"""Equal work: the time of the same iteration with each trainer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

from .figures import summarize
from .jobs import BUILD, ROOT, RaceError, loopfast_job, model_folder, run_worker, score_job, trl_job
from .settings import Json, Work, best, loopfast_config, loopfast_pairs, merged, trl_config, trl_pairs

Say = Callable[[str], None]

# Rounding may differ between two builds of the same ops.
REWARD_TOLERANCE = 1e-5


def prepare_model(work: Work) -> None:
    """Makes the model if it does not exist, in another process, so that this one stays small."""
    folder = model_folder(work)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.race.models", str(folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RaceError(f"{work.model} could not be made: {done.stderr.strip().splitlines()[-1]}")


class Race:
    """Runs of one work, with either trainer.

    Args:
        name: the work's name.
        work: the content of an iteration.
        prompts: texts to draw the iteration's prompts from; evenly spaced ones are used.
        threads: the number of threads of both.
        overrides: the part of our configuration that differs from its defaults.
    """

    def __init__(
        self, name: str, work: Work, prompts: Sequence[str], threads: int, overrides: Mapping[str, object]
    ) -> None:
        self.work, self._threads, self._overrides = work, threads, overrides
        self._folder = BUILD / "equal" / name
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self.prompts = [prompts[index * len(prompts) // work.prompts] for index in range(work.prompts)]
        self._file = self._folder / "prompts.txt"
        self._file.write_text("\n".join(self.prompts) + "\n", "utf-8")
        self._runs = 0
        self.images = self._folder / "images.safetensors"

    def trl(
        self,
        batches: tuple[int, int],
        *,
        iterations: int,
        dtype: str = "float32",
        updates: int | None = None,
        ratios: bool = False,
    ) -> Json:
        """Runs TRL once."""
        job = trl_job(
            self.work,
            trl_config(self.work, batches, dtype=dtype, updates=updates),
            self.prompts,
            iterations=iterations,
            repeat=self.work.samples,
            keep_images=None if self.images.exists() else self.images,
            ratios=ratios,
        )
        return run_worker("trl_worker", job, self._next(), self._threads)

    def loopfast(
        self,
        microbatches: tuple[int, int],
        *,
        iterations: int,
        dtype: str = "float32",
        updates: int | None = None,
    ) -> Json:
        """Runs loopfast once."""
        folder = self._next()
        config = loopfast_config(
            self.work,
            microbatches,
            model=str(model_folder(self.work)),
            prompts=str(self._file),
            dtype=dtype,
            updates=updates,
        )
        job = loopfast_job(merged(config, self._overrides), folder / "run", iterations=iterations)
        return run_worker("loopfast_worker", job, folder, self._threads)

    def judge(self, prompts: Sequence[str]) -> Json:
        """Compares our rewards of the first images that TRL scored with those that it computed in its environment."""
        return run_worker(
            "judge", score_job(self.images, prompts, self.work.reward), self._next(), self._threads
        )

    def _next(self) -> Path:
        self._runs += 1
        return self._folder / f"{self._runs:03d}"


def _sizes(race: Race, say: Say) -> Json:
    """Times every batch size of both, with one iteration after one to warm up."""
    found: Json = {"trl": [], "loopfast": []}
    kept: Json = {}
    for batches in race.work.trl_batches:
        run = race.trl(batches, iterations=2)
        kept.setdefault("prompts", run["prompts"])
        found["trl"].append({"batches": list(batches), **_brief(run, race.work.images)})
        say(f"  TRL, batches {batches}: {found['trl'][-1]['seconds']:.2f} s")
    for microbatches in race.work.microbatches:
        run = race.loopfast(microbatches, iterations=2)
        found["loopfast"].append({"microbatches": list(microbatches), **_brief(run, race.work.images)})
        say(f"  loopfast, microbatches {microbatches}: {found['loopfast'][-1]['seconds']:.2f} s")
    return {**found, "scored_prompts": kept["prompts"]}


def _within(entries: Sequence[Json], theirs: Json) -> Json:
    """Returns our fastest sizes that need no more memory than TRL's fastest, or our fastest of all if none does."""
    small = [entry for entry in entries if entry["peak_bytes"] <= theirs["peak_bytes"]]
    return dict(best(small or entries, "seconds", largest=False))


def _brief(run: Json, images: int) -> Json:
    figures = summarize([run], images)
    return {key: figures[key] for key in ("seconds", "peak_bytes")}


def race_equal_work(
    name: str,
    work: Work,
    prompts: Sequence[str],
    *,
    threads: int,
    rounds: int,
    overrides: Mapping[str, object],
    say: Say,
) -> Json:
    """Finds batch sizes (ours within TRL's memory), runs both in turn, and records the ratios before the first update.

    Args:
        name: the work's name.
        work: the content of an iteration.
        prompts: texts to draw the iteration's prompts from.
        threads: the number of threads of both.
        rounds: the number of runs of each.
        overrides: the part of our configuration that differs from its defaults.
        say: shows a line of progress.

    Returns:
        The entry of the results' file, and the versions under ``versions``.

    Raises:
        RaceError: a run failed, or the trainers did not do the same work.
    """
    prepare_model(work)
    race = Race(name, work, prompts, threads, overrides)
    say(f"{name}: batch sizes")
    sizes = _sizes(race, say)
    batches = tuple(best(sizes["trl"], "seconds", largest=False)["batches"])
    microbatches = tuple(
        _within(sizes["loopfast"], best(sizes["trl"], "seconds", largest=False))["microbatches"]
    )
    rewards = race.judge(sizes.pop("scored_prompts"))
    if rewards["largest_difference"] > REWARD_TOLERANCE:
        raise RaceError(f"{name}: the same images differ in reward by {rewards['largest_difference']:.2g}")

    runs: Json = {"trl": [], "loopfast": []}
    for number in range(rounds):
        runs["trl"].append(race.trl(batches, iterations=1 + work.measured))
        runs["loopfast"].append(race.loopfast(microbatches, iterations=1 + work.measured))
        say(f"  round {number + 1} of {rounds}: " + _round(runs))
    trl, ours = (summarize(runs[trainer], work.images) for trainer in ("trl", "loopfast"))
    ratios_of_rounds = [
        theirs / own for theirs, own in zip(trl["seconds_of_runs"], ours["seconds_of_runs"], strict=True)
    ]
    for figure in ("optimizer_steps", "trainable"):
        if trl[figure] != ours[figure]:
            raise RaceError(f"{name}: {figure} is {trl[figure]} for TRL and {ours[figure]} for loopfast")
    pairs = (
        trl_pairs(trl_config(work, batches)),
        loopfast_pairs(loopfast_config(work, microbatches, model="", prompts=""), work.steps),
    )
    if pairs[0] != pairs[1]:
        raise RaceError(f"{name}: an update is of {pairs[0]} pairs for TRL and {pairs[1]} for loopfast")

    ratios = {}
    for dtype in work.precisions:
        say(f"  ratios before the first update, {dtype}")
        theirs = race.trl(batches, iterations=1, dtype=dtype, updates=1, ratios=True)
        # equal sizes: then every model call has the same shape, in every precision
        own = race.loopfast((microbatches[1], microbatches[1]), iterations=1, dtype=dtype, updates=1)
        ratios[dtype] = {
            "trl": theirs["outside"],
            "loopfast": own["outside"],
            "loopfast_deviation": own["deviation"],
        }
    first = {trainer: runs[trainer][0]["versions"] for trainer in runs}
    return {
        "work": {
            "model": work.model,
            "tune": work.tune,
            "images": work.images,
            "steps": work.steps,
            "guidance": work.guidance,
            "updates": work.updates,
            "pairs_per_update": pairs[0],
            "reward": work.reward,
            "dtype": "float32",
            "overrides": dict(overrides),
        },
        "sizes": sizes,
        "trl": {**trl, "batches": list(batches)},
        "loopfast": {**ours, "microbatches": list(microbatches)},
        # of runs one after the other, because the speed of a shared machine changes
        "speedup": median(ratios_of_rounds),
        "speedup_of_rounds": ratios_of_rounds,
        "memory": ours["peak_bytes"] / trl["peak_bytes"],
        "ratios": ratios,
        "same_rewards": rewards,
        "versions": first,
    }


def _round(runs: Json) -> str:
    latest = {trainer: summarize(runs[trainer][-1:], 1)["seconds"] for trainer in runs}
    return f"TRL {latest['trl']:.2f} s, loopfast {latest['loopfast']:.2f} s"
