"""T2I-CompBench's score of attribute binding: BLIP answers a question for each noun phrase.

Huang et al., *T2I-CompBench* (arXiv 2307.06350, section 4.1), as its code computes it (`BLIPvqa_eval`): the image is
shown to BLIP's VQA model (arXiv 2201.12086) with the question "<noun phrase>?"; the decoder's first token gives

    P(yes) = p("yes") / (p("yes") + p("no")),

and the score is the product over the phrases. The benchmark rounds each probability to 4 digits; this code does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from loopfast.errors import ConfigError, RewardError
from loopfast.policies import pad_rows
from loopfast.rewards.base import shown
from loopfast.rewards.models.noun_phrases import SPLITTERS, load_spacy
from loopfast.rewards.models.preprocessing import load_preprocessing
from loopfast.rewards.models.pretrained import Placement, ScoreBatch, pretrained
from loopfast.rewards.models.weights import Source, require_folder

__all__ = ["blip_vqa"]

_WEIGHTS = "Salesforce/blip-vqa-capfilt-large"
# its main branch holds pickles only; this one adds the same weights as safetensors
_REVISION = "refs/pr/7"
_QUESTION_TOKENS = 35
_REMOVED = re.compile(r"[.!\"()*#:;~]")


@pretrained
def blip_vqa(
    place: Placement, weights: str = _WEIGHTS, phrases: str = "rules", revision: str | None = None
) -> Callable[[], ScoreBatch]:
    """Score of the attributes of a prompt's objects, in [0, 1]: the product of the yes-probabilities.

    The phrases are the list ``phrases`` of the prompt's metadata, if given, else the prompt is split. A prompt
    without noun phrases is itself the one question.

    Args:
        weights: a BLIP VQA model of transformers, a folder or a hub name.
        phrases: the splitter of prompts: ``rules`` (the package's own) or ``spacy`` (the benchmark's; needs the extra
            ``spacy`` and its model ``en_core_web_sm``).
        batch_size: images per call of the vision model, and questions per call of the text model.
    """
    if phrases not in SPLITTERS:
        raise ConfigError(f"reward 'blip_vqa': phrases: found {phrases!r}, allowed: {', '.join(SPLITTERS)}")
    if weights == _WEIGHTS and revision is None:
        revision = _REVISION
    source = require_folder(place.reward, "weights", weights, revision)

    def load() -> ScoreBatch:
        if phrases == "spacy":
            load_spacy()
        answer = _Questioner(place, source)
        split = SPLITTERS[phrases]

        def score(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
            asked = [
                _metadata_phrases(prompt, entry) or split(prompt) or [prompt]
                for prompt, entry in zip(prompts, metadata, strict=True)
            ]
            rows = [row for row, found in enumerate(asked) for _ in found]
            yes = answer(images, rows, [f"{phrase}?" for found in asked for phrase in found])
            return torch.stack([part.prod() for part in yes.split([len(found) for found in asked])])

        return score

    return load


def _metadata_phrases(prompt: str, entry: Mapping[str, Any]) -> list[str]:
    """Returns the phrases that a prompt's metadata names; empty if it names none."""
    found = entry.get("phrases", [])
    if not isinstance(found, list | tuple) or not all(
        isinstance(item, str) and item.strip() for item in found
    ):
        raise RewardError(
            f"prompt {shown(prompt)}: metadata phrases: found {found!r}, allowed: a list of texts"
        )
    return list(found)


class _Questioner:
    """BLIP, which answers yes-or-no questions about images."""

    def __init__(self, place: Placement, source: Source) -> None:
        from transformers import BlipForQuestionAnswering

        self._place = place
        self._model = source.load_model(BlipForQuestionAnswering).to(place.device, place.dtype)
        self._preprocess = load_preprocessing(source, "BLIP")
        self._tokenizer = source.load_tokenizer()
        self._start: int = self._model.decoder_start_token_id
        # BLIP adds two tokens to BERT's: [DEC], which starts answers, then [ENC], which starts questions. Its published
        # tokenizer has neither and starts questions with [CLS].
        self._question_start = self._start + 1
        vocabulary = self._tokenizer.get_vocab()
        missing = [word for word in ("yes", "no") if word not in vocabulary]
        if missing or self._question_start >= self._model.config.text_config.vocab_size:
            what = f"no token {missing[0]!r}" if missing else "no token [ENC] after the start token"
            raise ConfigError(f"{source}: {what} in the vocabulary")
        self._yes, self._no = vocabulary["yes"], vocabulary["no"]

    def __call__(self, images: Tensor, image_rows: list[int], questions: list[str]) -> Tensor:
        """Returns P(yes), float32 ``[Q]``, of each question about its image, by model calls of B questions.

        Args:
            images: float32 ``[B, 3, H, W]`` in [0, 1].
            image_rows: ``[Q]``, the row of ``images`` that each question is about.
            questions: ``[Q]``.
        """
        size = len(images)
        pixels = self._preprocess(images).to(self._place.dtype)
        seen = self._model.vision_model(pixel_values=pixels).last_hidden_state
        yes = torch.empty(len(questions), device=self._place.device)
        tokens = []
        by_length: dict[int, list[int]] = {}
        for row, question in enumerate(questions):
            text = _REMOVED.sub("", question.lower())
            ids = self._tokenizer(text, truncation=True, max_length=_QUESTION_TOKENS).input_ids
            tokens.append([self._question_start, *ids[1:]])
            by_length.setdefault(len(ids), []).append(row)
        groups = [
            (rows, torch.tensor([tokens[row] for row in rows], device=yes.device))
            for rows in by_length.values()
        ]
        # Questions of one length share a call, so that none is padded: transformers (5.23) does not mask the padding
        # where the decoder attends to the question.
        for rows, asked in groups:
            for start in range(0, len(rows), size):
                chunk = rows[start : start + size]
                about = seen[[image_rows[row] for row in chunk]]
                found = self._ask(pad_rows(about, size), pad_rows(asked[start : start + size], size))
                yes[chunk] = found[: len(chunk)]
        return yes

    def _ask(self, seen: Tensor, ids: Tensor) -> Tensor:
        """Returns P(yes), float32 ``[R]``, of questions ``ids`` ``[R, L]`` about encoded images ``[R, S, D]``."""
        question = self._model.text_encoder(input_ids=ids, encoder_hidden_states=seen).last_hidden_state
        answer = self._model.text_decoder(
            input_ids=torch.full((len(ids), 1), self._start, device=ids.device),
            encoder_hidden_states=question,
            use_cache=False,
        )
        logits = answer.logits[:, 0].float()
        # the softmax's normalizer cancels
        return torch.sigmoid(logits[:, self._yes] - logits[:, self._no])
