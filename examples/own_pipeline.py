"""Trains a LoRA for a pipeline object, here with another scheduler, and draws an image with the result."""

from importlib import resources

from diffusers import DDIMScheduler, StableDiffusionPipeline

import loopfast

# Any pipeline of a family that loopfast trains; this small one comes with the package.
pipeline = StableDiffusionPipeline.from_pretrained(resources.files("loopfast.embedded") / "model")
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")

run = loopfast.train(
    "tiny-lora",
    model=pipeline,  # it is copied, and does not change
    reward=[{"name": "jpeg_compressibility"}, {"name": "embedded", "weight": 0.0}],
    prompts=["a red circle", "a blue square"],
    run={"name": "own-pipeline"},
    rollout={"prompts_per_iteration": 4},
    train={"iterations": 2},
    evaluation={"prompts": ["a green triangle"], "every": 0},
)
print(f"the LoRA is in {run.model}, its base in {run.config.model.pretrained}")
trained = run.pipeline()
trained("a green triangle", num_inference_steps=10).images[0].save("own-pipeline.png")
