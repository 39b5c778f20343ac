"""The detector on small models with random weights: what transformers finds, whatever is asked beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loopfast.errors import ConfigError
from loopfast.rewards.models.detection import Box, Detection, Detector, without_overlaps
from loopfast.rewards.models.pretrained import placement
from loopfast.rewards.models.weights import Source
from tests.tiny_models import SIZE, write_detector

NAMES = [["red circle", "blue square"], ["dog"], ["cat", "green star", "bowl"], ["dog", "cat"], ["cow"]]


@pytest.fixture(scope="module", params=["owlv2", "owlvit"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detector(tmp_path_factory.mktemp(request.param), request.param)


def detector(folder: Path, threshold: float = 0.1, dtype: str = "float32") -> Detector:
    source = Source("spatial", "weights", str(folder))
    return Detector(placement("spatial", "cpu", dtype, 4), source, threshold)


def by_transformers(folder: Path, image: Tensor, names: list[str]) -> list[tuple[str, float, list[float]]]:
    """Name, score and corners of each patch's box of one image of the model's own size, by the whole model."""
    import transformers

    kind = transformers.AutoConfig.from_pretrained(folder).model_type
    cls: Any = {
        "owlv2": transformers.Owlv2ForObjectDetection,
        "owlvit": transformers.OwlViTForObjectDetection,
    }[kind]
    model = cls.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(
        [f"a photo of a {name}" for name in names], padding="max_length", max_length=16, return_tensors="pt"
    )
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        output = model(**tokens, pixel_values=((image - mean) / std)[None])
    scores = output.logits[0].sigmoid()
    found = []
    for row, (x, y, w, h) in zip(scores, output.pred_boxes[0].tolist(), strict=True):
        corners = [v * SIZE for v in (x - w / 2, y - h / 2, x + w / 2, y + h / 2)]
        found.append((names[int(row.argmax())], float(row.max()), [min(max(v, 0), SIZE) for v in corners]))
    return found


def test_it_finds_what_the_model_finds(folder: Path) -> None:
    images = torch.rand(3, 3, SIZE, SIZE)
    found = detector(folder)(images, NAMES[:3])
    for image, names, detections in zip(images, NAMES[:3], found, strict=True):
        expected = [
            Detection(name, score, Box(*corners))
            for name, score, corners in by_transformers(folder, image, names)
            if score > 0.1
        ]
        expected = without_overlaps([one for one in expected if one.box.area > 0])
        assert [one.name for one in detections] == [one.name for one in expected]
        for ours, theirs in zip(detections, expected, strict=True):
            assert ours.score == pytest.approx(theirs.score, abs=1e-5)
            for corner in ("x0", "y0", "x1", "y1"):
                assert getattr(ours.box, corner) == pytest.approx(getattr(theirs.box, corner), abs=1e-3)
        assert {one.name for one in detections} <= set(names)


def test_neighbors_change_nothing(folder: Path, images: Tensor) -> None:
    found = detector(folder)
    together = found(images, NAMES)
    for index, (image, names) in enumerate(zip(images, NAMES, strict=True)):
        [alone] = found(image[None], [names])
        assert [one.name for one in alone] == [one.name for one in together[index]]
        for ours, theirs in zip(alone, together[index], strict=True):
            assert ours.score == pytest.approx(theirs.score, abs=1e-5)


def test_boxes_are_inside_images_that_are_not_square(folder: Path, images: Tensor) -> None:
    height, width = images.shape[-2:]
    boxes = [one.box for found in detector(folder)(images, NAMES) for one in found]
    assert boxes
    assert all(0 <= box.x0 < box.x1 <= width and 0 <= box.y0 < box.y1 <= height for box in boxes)


def test_the_threshold_leaves_out_the_less_sure(folder: Path, images: Tensor) -> None:
    all_found, sure = (detector(folder, threshold)(images, NAMES) for threshold in (0.1, 0.6))
    assert sum(map(len, sure)) < sum(map(len, all_found))
    assert all(one.score > 0.6 for found in sure for one in found)


def test_another_model_is_refused(clip_folder: Path) -> None:
    with pytest.raises(
        ConfigError, match="found a model of type 'clip', expected a detector of type owlvit or"
    ):
        detector(clip_folder)


BOX = Box(10, 10, 30, 20)


@pytest.mark.parametrize(
    ("other", "overlap", "iou"),
    [
        (BOX, 200, 1.0),
        (Box(20, 10, 40, 20), 100, 100 / 300),
        (Box(15, 12, 25, 18), 60, 60 / 200),
        (Box(30, 10, 40, 20), 0, 0.0),
        (Box(10, 30, 30, 40), 0, 0.0),
        (Box(10, 10, 10, 10), 0, 0.0),
    ],
)
def test_overlaps(other: Box, overlap: float, iou: float) -> None:
    assert BOX.overlap(other) == other.overlap(BOX) == overlap
    assert BOX.iou(other) == other.iou(BOX) == pytest.approx(iou)


def test_the_same_object_counts_once() -> None:
    sure, again, beside = Box(0, 0, 10, 10), Box(0, 1, 10, 11), Box(0, 5, 10, 15)
    found = [
        Detection("cat", 0.5, again),
        Detection("cat", 0.9, sure),
        Detection("dog", 0.4, again),
        Detection("cat", 0.3, beside),
    ]
    assert without_overlaps(found) == [found[1], found[2], found[3]]


def test_an_empty_box_has_no_overlap_with_itself() -> None:
    empty = Box(3, 3, 3, 3)
    assert empty.iou(empty) == 0.0
    assert (empty.area, empty.center) == (0, (3, 3))


def test_bfloat16_is_close(folder: Path) -> None:
    """In scores and boxes of every patch: which of them are left as detections may turn on a last bit."""
    images, names = torch.rand(3, 3, SIZE, SIZE), [["dog"], ["cat"], ["cow"]]

    def seen(dtype: str) -> Tensor:
        made, outputs = detector(folder, dtype=dtype), []
        made._model.register_forward_hook(lambda module, args, output: outputs.append(output))
        made(images, names)
        [output] = outputs
        return torch.cat([output.logits.float().sigmoid(), output.pred_boxes.float()], -1)

    exact, rounded = seen("float32"), seen("bfloat16")
    assert 0 < (exact - rounded).abs().mean() < 0.02
    assert exact.std() > 0.2


def test_spatial_relations_in_bfloat16(tmp_path: Path, score: Callable[..., Tensor]) -> None:
    images, prompts = torch.rand(2, 3, SIZE, SIZE), ["a dog next to a cat"] * 2
    found = score("spatial", images, prompts, weights=str(write_detector(tmp_path)), dtype="bfloat16")
    assert ((found >= 0) & (found <= 1)).all()
