"""VQAScore: the probability that a model that sees the image answers "does it show this?" with yes.

Lin et al., *Evaluating Text-to-Visual Generation with Image-to-Text Generation* (arXiv 2404.01291, equation 1), as the
reference code (`t2v_metrics`) computes it:

* for encoder-decoders (InstructBLIP and BLIP-2 with Flan-T5), the geometric mean of the probabilities of the answer's
  tokens, with the end of the sequence;
* for chat models, the probability of the answer's token as the first of the reply.

The paper's own CLIP-FlanT5 is not in transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loopfast.errors import ConfigError
from loopfast.rewards.models.pretrained import Placement, ScoreBatch, pretrained
from loopfast.rewards.models.weights import require_folder

__all__ = ["vqa_score"]

_TEXT = "{text}"
_ENCODER_DECODERS = {
    "instructblip": "InstructBlipForConditionalGeneration",
    "blip-2": "Blip2ForConditionalGeneration",
}
# question and answer of the reference code for InstructBLIP, and for most other models
_BLIP_WORDS = ('Question: Does this figure show "{text}"? Please answer yes or no.', "yes")
_CHAT_WORDS = ('Does this figure show "{text}"? Please answer yes or no.', "Yes")


@pretrained
def vqa_score(
    place: Placement,
    weights: str = "Salesforce/instructblip-flan-t5-xl",
    question: str | None = None,
    answer: str | None = None,
    revision: str | None = None,
) -> Callable[[], ScoreBatch]:
    """The probability of "yes" to the question whether the image shows its prompt, in [0, 1].

    Args:
        weights: a folder or a hub name: InstructBLIP or BLIP-2 with Flan-T5, or a chat model of transformers that sees
            images and has a chat template.
        question: the question, with ``{text}`` in place of the prompt; None takes the reference code's for this kind
            of model.
        answer: the answer whose probability is the score; None takes the reference code's for this kind of model.
    """
    source = require_folder(place.reward, "weights", weights, revision)
    if question is not None and _TEXT not in question:
        raise ConfigError(f"reward 'vqa_score': question: found {question!r}, expected: a text with {_TEXT}")

    def load() -> ScoreBatch:
        import transformers
        from PIL import Image

        config = source.load_config(transformers.AutoConfig)
        processor = source.load_config(transformers.AutoProcessor)
        if config.model_type in _ENCODER_DECODERS:
            words, probability = _BLIP_WORDS, _by_encoder_decoder
        else:
            words, probability = _CHAT_WORDS, _by_chat_model
        template, reply = question or words[0], answer or words[1]
        if problem := _problem(config, processor, reply):
            raise ConfigError(f"{source}: {problem}")
        cls = getattr(transformers, _ENCODER_DECODERS.get(config.model_type, "AutoModelForImageTextToText"))
        model = source.load_model(cls).to(place.device, place.dtype)

        def score(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
            questions = [template.replace(_TEXT, prompt) for prompt in prompts]
            pixels = (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()
            # every model's own processor takes PIL images
            pictures = [Image.fromarray(picture.numpy()) for picture in pixels]
            return probability(place, model, processor, pictures, questions, reply)

        return score

    return load


def _problem(config: Any, processor: Any, answer: str) -> str | None:
    """Returns the problem of a model or answer; None if both can be used."""
    chat = config.model_type not in _ENCODER_DECODERS
    if chat and not getattr(processor, "chat_template", None):
        return f"a {config.model_type} without a chat template; allowed: {', '.join(_ENCODER_DECODERS)} or chat models"
    if not chat and config.use_decoder_only_language_model:
        found = config.text_config.model_type
        return f"found a {config.model_type} with {found!r}, expected: one with an encoder-decoder such as Flan-T5"
    for_images = None if chat else getattr(processor, "qformer_tokenizer", None)
    if for_images is not None and for_images.get_vocab() == processor.tokenizer.get_vocab():
        # transformers takes the language model's tokenizer if this one is missing
        return "no tokenizer in its folder qformer_tokenizer"
    tokens = processor.tokenizer.encode(answer, add_special_tokens=False)
    if not tokens or processor.tokenizer.unk_token_id in tokens:
        # transformers makes an empty tokenizer if its files are missing
        return f"its tokenizer does not know the answer {answer!r}; are the tokenizer's files there?"
    if chat and len(tokens) > 1:
        return f"the answer {answer!r} is {len(tokens)} of its tokens, expected: 1"
    return None


def _by_encoder_decoder(
    place: Placement, model: Any, processor: Any, pictures: list[Any], questions: list[str], answer: str
) -> Tensor:
    """Returns the answer's probability, float32 ``[B]``, for B PIL images and B questions."""
    inputs = processor(images=pictures, text=questions, padding=True, return_tensors="pt")
    labels = processor.tokenizer([answer] * len(questions), return_tensors="pt").input_ids.to(place.device)
    logits = model(**inputs.to(place.device, place.dtype), labels=labels).logits
    tokens = logits.float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return tokens.mean(-1).exp()


def _by_chat_model(
    place: Placement, model: Any, processor: Any, pictures: list[Any], questions: list[str], answer: str
) -> Tensor:
    """Returns the same as `_by_encoder_decoder`, by a chat model."""
    turns = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        for question in questions
    ]
    inputs = processor(
        images=[[picture] for picture in pictures],
        text=processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False),
        padding=True,
        padding_side="right",  # so that a token has the same position in every batch
        return_tensors="pt",
    ).to(place.device, place.dtype)
    last = inputs["attention_mask"].sum(-1) - 1
    logits = model(**inputs, use_cache=False).logits
    first = logits[torch.arange(len(questions), device=last.device), last]
    (token,) = processor.tokenizer.encode(answer, add_special_tokens=False)
    return first.float().softmax(-1)[:, token]
