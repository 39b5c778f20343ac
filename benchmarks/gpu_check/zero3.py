"""Full training at SDXL's sizes with one process: ZeRO-3 with everything offloaded, against the local engine.

The model and the runs are those of `benchmarks.sharding`, which also takes several processes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from benchmarks.sharding import __main__ as sharding
from loopfast.config import Config, parse_config

from . import models, training
from .measure import Measurement, Work

_WIDTH = 320


def _write_model(work: Work) -> None:
    began = time.monotonic()
    folder = work.folder / "model"
    if work.small:  # on a CPU the time of sharding grows with the number of layers
        facts = models.write(models.tiny("sd15"), folder)
    else:
        facts = {"parameters": sharding.write_model(folder, _WIDTH, work.device)}
    work.record.write(work.name, **facts, wall_seconds=time.monotonic() - began)


def _train(overrides: Sequence[str], *, small: bool) -> Measurement:
    def config(work: Work) -> Config:
        given = [f"model.pretrained={work.folder / 'model'}", f"model.device={work.device}"]
        given += [f"run.directory={work.folder / work.name.replace(' ', '-').replace(',', '')}", *overrides]
        given += ["train.on_policy_check=warn", "train.iterations=2", "checkpoint.every=1000"]
        if work.small:
            given += [
                "rollout.prompts_per_iteration=1",
                "algorithm.samples_per_prompt=2",
                "rollout.steps=2",
                "train.updates_per_iteration=1",
            ]
            given += [
                "model.dtype=float32",
                "evaluation.limit_prompts=1",
            ]
        return parse_config(sharding.RUN, given)

    def run(work: Work) -> None:
        found = config(work)
        images = found.rollout.prompts_per_iteration * found.algorithm.samples_per_prompt
        training.run(work, found, images * found.rollout.steps)

    return Measurement(run, 120, config, small=small)


MEASUREMENTS = {
    "model": Measurement(_write_model, needed=True),
    # The small check only tests whether DeepSpeed runs here: other stages test the local engine.
    **{name: _train(overrides, small=bool(overrides)) for name, overrides in sharding.ENGINES.items()},
}
