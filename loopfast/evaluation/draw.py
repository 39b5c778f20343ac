"""Draws the images of an evaluation or a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from loopfast.distributed.world import SINGLE_PROCESS, World
from loopfast.prompts import Prompt
from loopfast.rollout import Sampler, slices


def draw(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    seeds: Tensor,
    *,
    world: World = SINGLE_PROCESS,
    between: Callable[[], None] = lambda: None,
) -> Iterator[tuple[slice, Tensor]]:
    """Draws images, a microbatch at a time; a microbatch encodes each of its texts once.

    Args:
        prompts: the prompt of each of N images.
        seeds: int64 ``[N]``, the noise seed of each image.
        world: the processes that draw together. Each draws its shard of the images, in as many microbatches as the
            others, as they may need its part of the weights.
        between: called before each microbatch; it may raise to stop.

    Yields:
        The positions of a microbatch, and its images ``[n, 3, H, W]``. A microbatch without images of this process has
        no positions, and the first image of all.
    """
    own = world.shard(len(prompts))
    calls = world.calls(len(prompts), sampler.microbatch)
    for part in slices(own.stop - own.start, sampler.microbatch, calls):
        between()
        rows = slice(own.start + part.start, own.start + part.stop)
        drawn = rows if part.stop > part.start else slice(0, 1)
        texts = [prompt.text for prompt in prompts[drawn]]
        distinct = list(dict.fromkeys(texts))
        position = {text: index for index, text in enumerate(distinct)}
        prompt_index = torch.tensor([position[text] for text in texts])
        conditioning = sampler.policy.encode(distinct)
        yield rows, sampler.decode(sampler.sample(conditioning, prompt_index, seeds[drawn]).final)
