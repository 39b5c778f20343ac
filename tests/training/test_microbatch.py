from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from loopfast.errors import ConfigError, LoopfastError
from loopfast.training.microbatch import Microbatches, start_size

OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB. See documentation"
)


def make(
    rollout: Any, train: Any, start: int = 13, release: Callable[[], None] = lambda: None
) -> tuple[Microbatches, list[str]]:
    warnings: list[str] = []
    return Microbatches(rollout, train, start, warnings.append, release=release), warnings


@pytest.mark.parametrize(
    ("rollout", "train", "sizes", "shared"),
    [
        ("auto", "auto", (13, 13), True),
        (5, "auto", (5, 5), False),
        ("auto", 6, (6, 6), False),
        (5, 6, (5, 6), False),
    ],
)
def test_auto_is_the_size_of_the_other_call(
    rollout: Any, train: Any, sizes: tuple[int, int], shared: bool
) -> None:
    found, _ = make(rollout, train)
    assert (found.rollout, found.train) == sizes
    assert found.shared is shared
    assert (found.automatic("rollout"), found.automatic("train")) == (rollout == "auto", train == "auto")


@pytest.mark.parametrize(
    ("rollout", "tries", "left"), [("auto", [13, 6, 3], 3), (13, [13, 6, 3], 13), (20, [20, 10, 5, 2], 20)]
)
def test_a_call_is_tried_with_half_the_rows_until_it_fits(rollout: Any, tries: list[int], left: int) -> None:
    tried = []

    def attempt(rows: int) -> str:
        tried.append(rows)
        if rows > 3:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return f"done with {rows}"

    microbatches, warnings = make(rollout, "auto")
    assert microbatches.with_oom_fallback("train", attempt) == f"done with {tries[-1]}"
    assert (microbatches.rollout, microbatches.train) == (left, tries[-1])
    assert tried == tries
    told = [
        f"train.microbatch: {rows} rows per model call do not fit into memory; going on with {rows // 2}"
        for rows in tries[:-1]
    ]
    assert warnings == told
    microbatches.with_oom_fallback("train", attempt)
    assert tried == [*tries, tries[-1]]
    assert warnings == told


def fail(rows: int) -> None:
    raise torch.OutOfMemoryError(OUT_OF_MEMORY)


def test_a_number_is_not_changed() -> None:
    microbatches, warnings = make("auto", 6)
    with pytest.raises(ConfigError) as caught:
        microbatches.with_oom_fallback("train", fail)
    assert str(caught.value) == (
        "train.microbatch: 6 row(s) per model call do not fit into memory; give a smaller number, or auto "
        "(CUDA out of memory)"
    )
    assert (microbatches.train, warnings) == (6, [])


def test_where_not_even_one_row_fits_other_levers_are_named() -> None:
    microbatches, warnings = make("auto", "auto")
    with pytest.raises(
        LoopfastError, match=r"rollout\.microbatch: not even one row .*gradient_checkpointing"
    ):
        microbatches.with_oom_fallback("rollout", fail)
    assert len(warnings) == 3
    assert microbatches.train == 1


def test_what_calls_keep_is_freed_before_fewer_rows_are_tried() -> None:
    done: list[str] = []

    def attempt(rows: int) -> None:
        done.append(str(rows))
        if rows > 2:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    microbatches, _ = make("auto", "auto", 8, lambda: done.append("released"))
    microbatches.with_oom_fallback("train", attempt)
    assert done == ["8", "released", "4", "released", "2"]


def test_halving_goes_on_where_the_allocator_refuses_to_give_memory_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> None:
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    microbatches, _ = make("auto", "auto", 8)
    microbatches.halve("train", "")
    assert microbatches.train == 4


def test_other_errors_are_not_about_memory() -> None:
    def attempt(rows: int) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        make("auto", "auto")[0].with_oom_fallback("train", attempt)


def test_only_automatic_sizes_are_taken_from_a_checkpoint() -> None:
    saved, _ = make("auto", "auto")
    saved.halve("train", "")
    both, one = make("auto", "auto")[0], make("auto", 9)[0]
    for each in (both, one):
        each.load_state_dict(saved.state_dict())
    assert (both.rollout, both.train) == (6, 6)
    assert (one.rollout, one.train) == (6, 9)


def test_auto_starts_larger_on_a_gpu() -> None:
    latent, gpu = (4, 64, 64), torch.device("cuda")
    assert [start_size(rows, latent, torch.device("cpu")) for rows in (3, 1000)] == [3, 4]
    assert [start_size(rows, latent, gpu) for rows in (3, 1000)] == [3, 64]
