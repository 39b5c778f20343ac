"""Draws with exported models in plain diffusers, in the Python of an environment without loopfast's packages."""

import json
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file


def draw(kind, job, name):
    place = Path(job["place"])
    pipeline = kind.from_pretrained(job["base"] or place / "export")
    pipeline.set_progress_bar_config(disable=True)
    given = load_file(place / "given.safetensors")["latents"]
    options = {**job["options"]}
    if type(pipeline).__name__.startswith("PixArt"):
        options |= {"use_resolution_binning": False, "clean_caption": False, "height": 32, "width": 32}

    def images():
        return pipeline(
            ["a red circle and a blue square"],
            latents=given,
            num_inference_steps=2,
            guidance_scale=3.0,
            output_type="pt",
            **options,
        ).images.contiguous()

    drawn = {}
    if job["base"]:
        drawn["untrained"] = images()
        pipeline.load_lora_weights(place / "export")
    save_file({**drawn, "images": images()}, place / f"{name}.safetensors")


if __name__ == "__main__":
    import diffusers
    import transformers

    for job in json.loads(sys.argv[1]):
        draw(diffusers.DiffusionPipeline, job, "elsewhere")
    print(diffusers.__version__, transformers.__version__)
