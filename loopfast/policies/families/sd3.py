"""Stable Diffusion 3 and 3.5: a transformer over image and text tokens, sampled as a flow."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from loopfast.policies.base import Conditioning
from loopfast.policies.pipeline import JOINT_ATTENTION, PipelinePolicy


class StableDiffusion3Policy(PipelinePolicy):
    """A ``StableDiffusion3Pipeline``; see `PipelinePolicy`. Its T5 encoder may be missing, as diffusers allows."""

    lora_targets: ClassVar[tuple[str, ...]] = JOINT_ATTENTION
    sequence_length: ClassVar[int | None] = 256
    t5_tokenizer: ClassVar[str | None] = "tokenizer_3"

    @override
    def _encode(self, prompts: list[str]) -> Conditioning:
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}
