"""Full training at SDXL's sizes with one process: ZeRO-3 with everything offloaded, against the local engine.

The model and the runs are those of `benchmarks.sharding`, which also takes several processes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from benchmarks.sharding import __main__ as sharding
from loopfast.config import Config, parse_config

from . import training
from .measure import Measurement, Work

_WIDTH, _SMALL_WIDTH = 320, 32


def _write_model(work: Work) -> None:
    began = time.monotonic()
    width = _SMALL_WIDTH if work.small else _WIDTH
    parameters = sharding.write_model(work.folder / "model", width, work.device)
    work.record.write(work.name, parameters=parameters, wall_seconds=time.monotonic() - began)


def _train(overrides: Sequence[str]) -> Measurement:
    def config(work: Work) -> Config:
        given = [f"model.pretrained={work.folder / 'model'}", f"model.device={work.device}"]
        given += [f"run.directory={work.folder / work.name.replace(' ', '-').replace(',', '')}", *overrides]
        given += ["train.on_policy_check=warn", "train.iterations=2", "checkpoint.every=1000"]
        if work.small:
            given += ["rollout.prompts_per_iteration=1", "algorithm.samples_per_prompt=2", "rollout.steps=2"]
            given += [
                "model.dtype=float32",
                "model.height=64",
                "model.width=64",
                "evaluation.limit_prompts=1",
            ]
        return parse_config(sharding.RUN, given)

    def run(work: Work) -> None:
        found = config(work)
        images = found.rollout.prompts_per_iteration * found.algorithm.samples_per_prompt
        training.run(work, found, images * found.rollout.steps)

    return Measurement(run, 120, config)


MEASUREMENTS = {
    "model": Measurement(_write_model, needed=True),
    **{name: _train(overrides) for name, overrides in sharding.ENGINES.items()},
}
