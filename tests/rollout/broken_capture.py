"""Breaks a recording on a GPU on purpose, then does everything that a run does afterwards, in a separate process.

    python -m tests.rollout.broken_capture PIPELINE_FOLDER seen|unseen|out-of-memory

``seen``: the step reads a value, which PyTorch's debug mode detects before the recording. ``unseen``: it waits for the
device, which only the recording itself detects. Prints ``sound`` at the end.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from loopfast.rollout import StepCache
from tests.rollout import toy


def main(folder: Path, kind: str) -> None:
    said: list[str] = []
    policy: Any = toy.load(folder, device="cuda", tune="lora", dtype="bfloat16")
    expected = toy.run(toy.sampler(policy, folder, steps=StepCache(capture=False)))
    predict = policy.predict

    def broken(sample: torch.Tensor, *arguments: Any) -> Any:
        capturing = torch.cuda.is_current_stream_capturing()
        if kind == "seen":
            sample.sum().item()
        elif kind == "unseen":
            torch.cuda.synchronize()
        elif capturing:
            raise torch.OutOfMemoryError("CUDA out of memory. Planted.")
        return predict(sample, *arguments)

    policy.predict = broken
    made = toy.sampler(policy, folder, steps=StepCache(warn=said.append))
    stream = torch.cuda.current_stream()
    if kind == "out-of-memory":
        try:
            toy.run(made)
        except torch.OutOfMemoryError:
            said.append("out of memory")
    else:
        for _ in range(2):
            assert toy.same(toy.run(made), expected)
    assert len(said) == 1, said
    print(said[0])
    assert torch.cuda.current_stream() == stream
    torch.rand(3, device="cuda")
    made.release()
    torch.cuda.empty_cache()
    policy.predict = predict
    again = toy.sampler(policy, folder, steps=StepCache(warn=said.append))
    assert toy.same(toy.run(again), expected)
    assert len(said) == 1, said
    again.release()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    print("sound")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
