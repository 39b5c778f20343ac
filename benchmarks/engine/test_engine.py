"""Rollout, updates and a whole iteration: ours, a plain diffusers loop, and ours with one key changed.

Every competitor runs in its own process, once a session, so that its peak memory is its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from benchmarks.cases import device
from benchmarks.race.jobs import loopfast_job, model_folder, run_worker
from benchmarks.race.settings import loopfast_config, merged
from benchmarks.timing import Playback
from loopfast.prompts import load_prompts

from .cases import COMPETITORS, LEVERS, MEASURED, PHASES, WORK

Run = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a competitor's worker when its result is requested for the first time."""
    folder = tmp_path_factory.mktemp("engine")
    texts = [prompt.text for prompt in load_prompts("embedded:color")]
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(texts[: WORK.prompts]) + "\n", "utf-8")
    known: dict[str, dict[str, Any]] = {}

    def run(competitor: str) -> dict[str, Any]:
        if competitor not in known:
            changes = LEVERS[competitor].config if competitor in LEVERS else {}
            config = merged(
                loopfast_config(
                    WORK, (WORK.images, WORK.images), model=str(model_folder(WORK)), prompts=str(prompts)
                ),
                changes,
            )
            here = folder / competitor
            job = loopfast_job(config, here / "run", iterations=1 + MEASURED)
            worker: str | Path = (
                Path(__file__).parent / "plain_worker.py" if competitor == "plain" else "loopfast_worker"
            )
            known[competitor] = run_worker(worker, job, here, torch.get_num_threads())
        return known[competitor]

    return run


@pytest.mark.parametrize("op", PHASES)
@pytest.mark.parametrize("competitor", COMPETITORS)
def test_engine(
    op: str,
    competitor: str,
    measured: Run,
    playback: Playback,
    benchmark: Any,
    request: pytest.FixtureRequest,
) -> None:
    lever = LEVERS.get(competitor)
    if lever is not None and lever.device == "cuda" and device().type == "cpu":
        pytest.skip(lever.reason)
    if benchmark.disabled:
        pytest.skip("takes minutes; nothing but the time is looked at")
    machine = request.getfixturevalue("machine")

    def seconds(of: str) -> list[float]:
        return [iteration[PHASES[op]] for iteration in measured(of)["iterations"][1:]]

    durations = seconds(competitor)
    playback.load(durations)
    setting = f"{WORK.model}-{WORK.images}-float32"
    benchmark.group = f"{op} {setting}"
    benchmark.name = competitor
    benchmark.pedantic(lambda: None, rounds=len(durations))
    middle = benchmark.stats.stats.median
    # pairs that a key skips count as if they had been trained on: the iterations are compared
    pairs = WORK.images * WORK.steps
    rate = (
        {"pairs_per_s": pairs / middle} if op == "engine_replay" else {"images_per_s": WORK.images / middle}
    )
    benchmark.extra_info |= machine | {
        "op": op,
        "setting": setting,
        "competitor": competitor,
        "backend": None,
        **rate,
        "ratio": middle / median(seconds("ours")),
        "peak_bytes": measured(competitor)["peak_bytes"],
    }
