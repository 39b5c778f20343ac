"""Scores both trainers' results in our environment: ``python judge.py JOB``.

JOB is a JSON file that `benchmarks.race.jobs.score_job` or `benchmarks.race.jobs.evaluation_job` describes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from loopfast.config import RewardConfig, config_to_yaml, parse_config
from loopfast.evaluation import evaluate_checkpoint
from loopfast.rewards import build_rewards
from loopfast.run.checkpoints import CheckpointStore
from loopfast.run.console import Display


def score(job: dict[str, Any]) -> dict[str, Any]:
    """Returns the largest difference between the rewards that came with images, and ours."""
    kept = load_file(job["images"])
    rewards = build_rewards([RewardConfig(name=job["reward"])]).score(kept["images"], job["prompts"]).total
    difference = float((rewards - kept["rewards"]).abs().max())
    return {"images": len(rewards), "mean": float(rewards.mean()), "largest_difference": difference}


def evaluate(job: dict[str, Any]) -> dict[str, Any]:
    """Returns the rewards of files of UNet weights, each at every requested guidance."""
    evaluations = []
    for number, file in enumerate(job["weights"]):
        found = {}
        for guidance in job["guidances"]:
            config = parse_config(json.dumps(job["config"]), [f"rollout.guidance_scale={guidance}"])
            with tempfile.TemporaryDirectory() as folder:
                run = Path(folder)
                (run / "config.yaml").write_text(config_to_yaml(config), "utf-8")
                store = CheckpointStore(run / "checkpoints", keep=1, keep_best=False)
                store.save(1, 0, {"policy": load_file(file)}, {}, None)
                result = evaluate_checkpoint(
                    run,
                    prompts=job["prompts"],
                    images_per_prompt=job["images_per_prompt"],
                    seed=job["seed"],
                    output=None,
                    display=Display(quiet=True),
                )
            found[f"{guidance:g}"] = {"reward": result["reward"], **result["parts"]}
        evaluations.append(found)
        print(f"evaluated {number + 1} of {len(job['weights'])}", file=sys.stderr, flush=True)
    return {"evaluations": evaluations}


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    answer = {"score": score, "evaluate": evaluate}[task["kind"]](task)
    Path(task["result"]).write_text(json.dumps(answer), "utf-8")
