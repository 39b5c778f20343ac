"""Writes images."""

from __future__ import annotations

import io
import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from loopfast.system.files import write_file


def save_image(image: Tensor, path: Path) -> None:
    """Writes one float image ``[3, H, W]`` in [0, 1]; NaN is drawn black."""
    pixels = (image.float().nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(path)


def tile_sheet(tiles: Tensor, columns: int) -> Image.Image:
    """Returns all tiles in one image, row by row and without gaps; an incomplete last row is filled with white."""
    rows = math.ceil(len(tiles) / columns)
    count, channels, height, width = tiles.shape
    sheet = torch.ones(rows * columns, channels, height, width)
    sheet[:count] = tiles
    pixels = sheet.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    pixels = pixels.reshape(rows * height, columns * width, channels)
    return Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())


def write_image(image: Image.Image, path: Path) -> None:
    """Writes a PNG file completely or not at all."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    write_file(path, file.getvalue())
