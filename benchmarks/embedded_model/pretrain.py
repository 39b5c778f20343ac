"""Makes the embedded model from nothing: ``python -m benchmarks.embedded_model.pretrain --output DIR``.

Three stages: an autoencoder on faithful pictures; a text encoder and a UNet, trained together on pictures that do not
always show what their caption says (`defective`), so that the model binds attributes imperfectly; and the measurement
of its base scores for the model card. The seed determines the result, for a given number of threads.
"""

from __future__ import annotations

import argparse
import copy
import math
import platform
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import diffusers
import jinja2
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from benchmarks.embedded_model.parts import assemble, text_parts
from benchmarks.embedded_model.tokenizer import MAX_LENGTH, write_tokenizer
from loopfast.embedded import world
from loopfast.embedded.detector import exact, score
from loopfast.embedded.render import place, render
from loopfast.embedded.world import CATEGORIES, COLORS, SHAPES, TEXTURED_SHAPES, TEXTURES, Caption, Item
from loopfast.policies.portable import save_portable
from loopfast.system.streams import open_streams


@dataclass(frozen=True)
class Recipe:
    """The settings of pretraining, which the model card lists. Rates are shares of the captions they can apply to."""

    seed: int = 0
    autoencoder_steps: int = 2000
    autoencoder_batch: int = 64
    autoencoder_learning_rate: float = 2e-3
    images: int = 60_000
    steps: int = 4500
    batch: int = 128
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    ema: float = 0.998
    caption_dropout: float = 0.1
    leak: float = 0.35
    neglect: float = 0.20
    swap: float = 0.10
    wrong_relation: float = 0.40
    wrong_count: float = 0.65


Report = Callable[[str], None]


def defective(caption: Caption, recipe: Recipe, rng: random.Random) -> Caption | tuple[Item, ...]:
    """Returns what to draw for a caption: the caption itself, or the objects of a picture that gets it wrong.

    Leakage (both objects take one's attribute), neglect (an object is missing) and swaps are the failures that
    T2I-CompBench documents for Stable Diffusion 2.
    """
    if caption.count > 1:
        if rng.random() < recipe.wrong_count:
            count = rng.choice([n for n in (1, 2, 3, 4) if abs(n - caption.count) == 1])
            return replace(caption, count=count)
        return caption
    if len(caption.items) < 2:
        return caption
    first, second = caption.items
    if rng.random() < recipe.neglect:
        return (rng.choice(caption.items),)
    if caption.relation and rng.random() < recipe.wrong_relation:
        relation = rng.choice([r for r in world.RELATIONS if r != caption.relation])
        caption = replace(caption, relation=relation)
    if caption.category == "spatial":
        return caption
    draw_of = rng.random()
    attributes = [
        name for name in ("color", "texture", "shape") if getattr(first, name) != getattr(second, name)
    ]
    # the shapes tell the objects apart, unless they are what the caption is about
    attribute = rng.choice([name for name in attributes if name != "shape"] or ["shape"])
    if draw_of < recipe.leak:
        source, target = rng.sample((0, 1), 2)
        items = list(caption.items)
        items[target] = replace(items[target], **{attribute: getattr(items[source], attribute)})
        return replace(caption, items=tuple(items))
    if draw_of < recipe.leak + recipe.swap and attribute != "shape":
        swapped = (
            replace(first, **{attribute: getattr(second, attribute)}),
            replace(second, **{attribute: getattr(first, attribute)}),
        )
        return replace(caption, items=swapped)
    return caption


def pictures(captions: list[Caption], recipe: Recipe | None, rng: random.Random) -> Tensor:
    """Draws the captions, defectively if a recipe is given: ``[N, 3, 32, 32]`` in [0, 1]."""
    scenes = []
    for caption in captions:
        shown = defective(caption, recipe, rng) if recipe else caption
        if isinstance(shown, Caption):
            scenes.append(place(shown.objects(), shown.relation, rng))
        else:
            scenes.append(place(shown, None, rng))
    return render(scenes)


def training_captions(count: int, rng: random.Random) -> list[Caption]:
    """Draws captions for pretraining: each category and single objects equally often, held-out compositions never."""
    singles = [Item(color, shape) for color in COLORS for shape in SHAPES]
    singles += [Item(c, s, t) for c in COLORS for s in TEXTURED_SHAPES for t in TEXTURES]
    alone = [Caption("color", (item,)) for item in singles]
    pools = [world.prompts(category) for category in CATEGORIES] + [alone]
    captions = (rng.choice(rng.choice(pools)) for _ in range(count))
    return [c.reversed() if len(c.items) > 1 and rng.random() < 0.5 else c for c in captions]


def build(recipe: Recipe) -> StableDiffusionPipeline:
    """Makes the pipeline, with random weights drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )
    tokenizer, text_encoder = text_parts(64, MAX_LENGTH)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(40, 80),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,  # despite its name, the number of heads
        norm_num_groups=8,
    )
    return assemble(vae, tokenizer, text_encoder, unet)


def cosine(step: int, steps: int, warmup: int) -> float:
    """Returns the factor of the learning rate: a linear warm-up, then a half cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, learning_rate: float) -> None:
    group = optimizer.param_groups[0]
    group["lr"] = learning_rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


def train_autoencoder(vae: AutoencoderKL, recipe: Recipe, report: Report) -> None:
    """Fits the autoencoder to faithful pictures and sets its ``scaling_factor``."""
    rng = random.Random(recipe.seed + 1)
    torch.manual_seed(recipe.seed + 1)
    data = pictures(training_captions(20_000, rng), recipe, rng) * 2 - 1
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.autoencoder_learning_rate, weight_decay=0.0)
    vae.train()
    started = time.perf_counter()
    for step in range(recipe.autoencoder_steps):
        factor = cosine(step, recipe.autoencoder_steps, recipe.warmup_steps)
        batch = data[torch.randint(len(data), (recipe.autoencoder_batch,))]
        posterior = vae.encode(batch).latent_dist
        restored = vae.decode(posterior.sample()).sample
        error = F.mse_loss(restored, batch)
        loss = error + 1e-6 * posterior.kl().mean()
        _step(optimizer, loss, recipe.autoencoder_learning_rate * factor)
        if step % 250 == 249:
            report(
                f"autoencoder {step + 1}/{recipe.autoencoder_steps}  mse {error.item():.2e}"
                f"  {time.perf_counter() - started:.0f} s"
            )
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(data[:2000]).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encodes images in [0, 1] to scaled latents, in batches."""
    parts = [vae.encode(batch * 2 - 1).latent_dist.mean for batch in images.split(500)]
    return torch.cat(parts) * vae.config.scaling_factor


def train_denoiser(pipeline: StableDiffusionPipeline, recipe: Recipe, report: Report) -> None:
    """Trains text encoder and UNet on noise prediction, and leaves the moving average of their weights in them."""
    vae, text_encoder, unet = pipeline.vae, pipeline.text_encoder, pipeline.unet
    scheduler, tokenizer = pipeline.scheduler, pipeline.tokenizer
    rng = random.Random(recipe.seed + 2)
    torch.manual_seed(recipe.seed + 2)
    captions = training_captions(recipe.images, rng)
    report(f"drawing and encoding {recipe.images} pictures")
    latents = torch.cat(
        [encode(vae, pictures(captions[i : i + 2000], recipe, rng)) for i in range(0, len(captions), 2000)]
    )
    texts = [caption.text for caption in captions]
    tokens = tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids
    empty = tokenizer([""], padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids

    modules = torch.nn.ModuleList([text_encoder, unet])
    averaged = copy.deepcopy(modules).requires_grad_(False)
    parameters = list(modules.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    modules.train()
    started, running = time.perf_counter(), 0.0
    for step in range(recipe.steps):
        rows = torch.randint(len(latents), (recipe.batch,))
        clean, ids = latents[rows], tokens[rows]
        dropped = torch.rand(recipe.batch, 1) < recipe.caption_dropout
        ids = torch.where(dropped, empty, ids)
        noise = torch.randn_like(clean)
        timestep = torch.randint(scheduler.config.num_train_timesteps, (recipe.batch,))
        noisy = scheduler.add_noise(clean, noise, timestep)
        embeddings = text_encoder(ids)[0]
        loss = F.mse_loss(unet(noisy, timestep, embeddings).sample, noise)
        _step(optimizer, loss, recipe.learning_rate * cosine(step, recipe.steps, recipe.warmup_steps))
        decay = min(recipe.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(averaged.parameters()), [p.detach() for p in parameters], 1 - decay)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 99:
            report(
                f"denoiser {step + 1}/{recipe.steps}  loss {running:.4f}  {time.perf_counter() - started:.0f} s"
            )
    modules.load_state_dict(averaged.state_dict())
    modules.eval()


@torch.no_grad()
def base_scores(pipeline: StableDiffusionPipeline, count: int, seed: int) -> dict[str, dict[str, float]]:
    """Measures the pipeline's mean soft and exact score, per category and split, on ``count`` pictures each.

    Pictures are sampled as in training: DDIM with 10 steps and eta 1, no guidance.
    """
    found: dict[str, dict[str, float]] = {}
    for category in CATEGORIES:
        for split in ("train", "heldout"):
            pool = world.prompts(category, split)
            captions = [pool[i % len(pool)] for i in range(count)]
            images = pipeline(
                [c.text for c in captions],
                num_inference_steps=10,
                eta=1.0,
                guidance_scale=1.0,
                generator=torch.Generator().manual_seed(seed),
                output_type="pt",
            ).images
            name = category if split == "train" else f"{category}-{split}"
            found[name] = {
                "score": round(score(images, captions).mean().item(), 4),
                "exact": round(exact(images, captions).mean().item(), 4),
            }
    return found


def save(pipeline: StableDiffusionPipeline, directory: Path) -> None:
    """Converts the pipeline to half precision, and writes it so that transformers 4 and 5 both read it."""
    for module in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        module.half()
    save_portable(pipeline, directory)
    for file in (directory / "tokenizer").iterdir():
        file.unlink()
    write_tokenizer(directory / "tokenizer")


def pretrain(recipe: Recipe, output: Path, report: Report) -> None:
    """Trains the embedded model by a recipe and writes the pipeline and its model card to a folder."""
    started = time.perf_counter()
    pipeline = build(recipe)
    train_autoencoder(pipeline.vae, recipe, report)
    train_denoiser(pipeline, recipe, report)
    save(pipeline, output)
    minutes = (time.perf_counter() - started) / 60
    # the scores are those of the weights that are shipped, read back from half precision
    shipped = StableDiffusionPipeline.from_pretrained(output, torch_dtype=torch.float32)
    shipped.set_progress_bar_config(disable=True)
    scores = base_scores(shipped, 200, recipe.seed)
    for name, values in scores.items():
        report(f"{name:18s} score {values['score']:.3f}  exact {values['exact']:.3f}")
    (output / "README.md").write_text(model_card(recipe, scores, shipped, minutes), "utf-8")


def model_card(
    recipe: Recipe, scores: dict[str, dict[str, float]], pipeline: StableDiffusionPipeline, minutes: float
) -> str:
    """Returns the model card: the model's description, data, recipe and measured scores."""
    sizes = {
        name: sum(p.numel() for p in getattr(pipeline, name).parameters()) / 1e6
        for name in ("unet", "vae", "text_encoder")
    }
    template = Path(__file__).with_name("model_card.md.jinja")
    return jinja2.Template(template.read_text("utf-8"), keep_trailing_newline=True).render(
        sizes=sizes,
        total=sum(sizes.values()),
        recipe=asdict(recipe),
        scores=scores,
        categories=CATEGORIES,
        minutes=round(minutes),
        threads=torch.get_num_threads(),
        versions={
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    )


def main() -> None:
    """Runs the command line of this module."""
    open_streams(keep_going=True)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.embedded_model.pretrain", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write the pipeline to")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="updates of the denoiser")
    parser.add_argument("--autoencoder-steps", type=int, default=Recipe.autoencoder_steps)
    parser.add_argument("--images", type=int, default=Recipe.images, help="pictures in the training set")
    settings = vars(parser.parse_args())
    output = settings.pop("output")
    pretrain(Recipe(**settings), output, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
