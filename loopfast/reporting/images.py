"""Makes labeled grids of images, and cuts an evaluation's sprite sheet into its tiles."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    import torch

__all__ = ["data_uri", "image_grid", "tiles"]

_TILE = 160
_GAP = 14
_LINES = 3
_FONT = 12
_INK, _FADED, _PAPER = "#1d1d1f", "#6e6e73", "#ffffff"


def image_grid(
    images: torch.Tensor | np.ndarray[Any, Any],
    captions: Sequence[str],
    scores: Sequence[float] | None,
    columns: int,
) -> Image.Image:
    """Arranges images in a grid, each with its score and caption below it.

    Small images are enlarged by a whole factor without smoothing, so that their pixels are visible.

    Args:
        images: ``[N, 3, H, W]``, uint8, or floating point in [0, 1]; N at least 1.
        captions: N texts; long ones are cut to three lines.
        scores: N numbers, or None.
        columns: the number of images in a row.

    Raises:
        ValueError: the shapes or lengths do not match.
    """
    array = _as_uint8(images)
    if len(captions) != len(array) or (scores is not None and len(scores) != len(array)):
        raise ValueError(f"captions and scores must be {len(array)}, as many as there are images")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    height, width = array.shape[1:3]
    factor = max(1, round(_TILE / max(height, width)))
    tile_width, tile_height = width * factor, height * factor
    font = ImageFont.load_default(_FONT)
    bold = ImageFont.load_default(_FONT + 2)
    line = _FONT + 4
    label = (line + 4 if scores is not None else 0) + _LINES * line
    columns = min(columns, len(array))
    rows = -(-len(array) // columns)
    grid = Image.new(
        "RGB", (columns * (tile_width + _GAP) + _GAP, rows * (tile_height + label + _GAP) + _GAP), _PAPER
    )
    draw = ImageDraw.Draw(grid)
    for index, pixels in enumerate(array):
        left = _GAP + index % columns * (tile_width + _GAP)
        top = _GAP + index // columns * (tile_height + label + _GAP)
        tile = Image.fromarray(pixels).resize((tile_width, tile_height), Image.Resampling.NEAREST)
        grid.paste(tile, (left, top))
        y = top + tile_height + 4
        if scores is not None:
            draw.text((left, y), f"{scores[index]:.2f}", fill=_INK, font=bold)
            y += line + 2
        for text in _wrapped(captions[index], tile_width, font):
            draw.text((left, y), text, fill=_FADED, font=font)
            y += line
    return grid


def tiles(sheet: Image.Image, size: tuple[int, int], columns: int, count: int) -> list[Image.Image]:
    """Cuts a sprite sheet without gaps into its first ``count`` tiles of ``size`` (width, height), row by row.

    Tiles outside of the sheet are skipped.
    """
    width, height = size
    corners = ((index % columns * width, index // columns * height) for index in range(count))
    boxes = [(left, top, left + width, top + height) for left, top in corners]
    return [sheet.crop(box) for box in boxes if box[2] <= sheet.width and box[3] <= sheet.height]


def data_uri(image: Image.Image, largest: int = 384) -> str:
    """The image as a ``data:`` address: a small one as PNG, else a JPEG of at most ``largest`` pixels."""
    buffer = io.BytesIO()
    image = image.convert("RGB")
    if max(image.size) <= 128:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=90)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _as_uint8(images: torch.Tensor | np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Converts ``[N, 3, H, W]`` of either type to uint8 ``[N, H, W, 3]``."""
    if isinstance(images, np.ndarray):
        array = images
    else:  # NumPy has no bfloat16
        array = (images.float() if images.is_floating_point() else images).detach().cpu().numpy()
    if array.ndim != 4 or array.shape[1] != 3 or len(array) == 0:
        raise ValueError(f"images must be [N, 3, H, W] with N at least 1, got {list(array.shape)}")
    if array.dtype != np.uint8:
        array = np.round(np.clip(array.astype(np.float32), 0.0, 1.0) * 255.0).astype(np.uint8)
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1))


def _wrapped(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """Breaks a text into at most `_LINES` lines of ``width`` pixels. A line that is too long ends in an ellipsis."""
    lines: list[str] = []
    current = ""
    for word in text.split():
        longer = f"{current} {word}".strip()
        if not current or font.getlength(longer) <= width:
            current = longer
        else:
            lines.append(current)
            current = word
    lines.append(current)
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], " ".join(lines[_LINES - 1 :])]
    return [_cut(line, width, font) for line in lines]


def _cut(line: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line.rstrip() + "…"
