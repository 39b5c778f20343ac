"""Small reward models with random weights, saved in the format of the published ones; for tests of any folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks.embedded_model.tokenizer import END, MAX_LENGTH, START, write_tokenizer

SIZE = 32
_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_WORDS = """
yes no a an and the red green blue white black circle star square car bench bowl ?
"""
# scattered, so that random weights give scores that differ
_RANGE = 0.4


def write_detector(folder: Path, kind: str = "owlv2", *, seed: int = 0) -> Path:
    """An OWLv2 (or ``owlvit``) detector for images of 32 x 32 in 16 patches, with a tokenizer."""
    import transformers

    vocabulary = write_tokenizer(folder)
    name = {"owlv2": "Owlv2", "owlvit": "OwlViT"}[kind]
    text = {
        **_SMALL,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": vocabulary[START],
        "eos_token_id": vocabulary[END],
        "pad_token_id": 0,
        "initializer_range": _RANGE,
    }
    vision = {**_SMALL, "image_size": SIZE, "patch_size": 8, "initializer_range": _RANGE}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, projection_dim=32)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForObjectDetection")(config).eval()
    with torch.no_grad():
        # classes by more than the published scale of a new model, boxes of all sizes
        for parameter in (*model.class_head.parameters(), *model.box_head.parameters()):
            parameter.normal_(0, 0.4)
    model.save_pretrained(folder)
    return folder


def write_depth_model(folder: Path, *, seed: int = 0) -> Path:
    """A Depth Anything model for images of 28 x 28 in 4 patches, with its preprocessor's settings."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=28,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=14,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[4, 4, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=4,
    )
    torch.manual_seed(seed)
    DepthAnythingForDepthEstimation(config).eval().save_pretrained(folder)
    settings = {
        "image_processor_type": "DPTImageProcessor",
        "size": {"height": 28, "width": 28},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def write_blip(folder: Path, *, seed: int = 3) -> Path:
    """A BLIP that answers questions about images of 32 x 32, with BERT's tokenizer for a few words."""
    from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering, BlipImageProcessor

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_WORDS.split()]))
    BertTokenizer(str(vocabulary)).save_pretrained(folder)
    BlipImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    start = 5 + len(_WORDS.split())  # [DEC] and [ENC] follow BERT's tokens, as in the published model
    config = BlipConfig(
        text_config={
            **_SMALL,
            "vocab_size": start + 2,
            "bos_token_id": start,
            "sep_token_id": 3,
            "max_position_embeddings": 40,
            "encoder_hidden_size": 32,
            "initializer_range": _RANGE,
        },
        vision_config={**_SMALL, "image_size": SIZE, "patch_size": 8, "initializer_range": _RANGE},
    )
    torch.manual_seed(seed)
    BlipForQuestionAnswering(config).save_pretrained(folder)
    return folder
