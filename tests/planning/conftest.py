from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.planning.check_memory import write_pipeline


@pytest.fixture(scope="session")
def shallow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of Stable Diffusion's structure with one layer a block, and latents of 4×8×8."""
    return write_pipeline(tmp_path_factory.mktemp("shallow") / "model", latents=8, layers=1)


@pytest.fixture(scope="session")
def structured_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of Stable Diffusion's structure: a denoiser of 34 M weights, latents of 4×16×16."""
    return write_pipeline(tmp_path_factory.mktemp("structured") / "model", latents=16)
