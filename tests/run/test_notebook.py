"""A run in a real kernel: its progress is one line that changes, its images are shown, and nothing else is said."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
from jupyter_client.manager import KernelManager
from PIL import Image

from loopfast.run.notebook import NotebookDisplay, in_notebook

TRAIN = """\
import loopfast

def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))

run = loopfast.train(
    "tiny",
    reward=brightness,
    prompts=["a red circle", "a blue square"],
    run={"directory": FOLDER, "trackers": []},
    rollout={"prompts_per_iteration": 2},
    train={"iterations": 2},
    evaluation={"every": 0, "prompts": ["a red square"], "images_per_prompt": 1},
)
"""


@pytest.fixture
def kernel() -> Iterator[Any]:
    manager = KernelManager()
    manager.kernel_cmd = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]  # type: ignore[misc]
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=120)
        yield client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def messages(client: Any, code: str) -> list[tuple[str, dict[str, Any]]]:
    """What a cell shows, kind by kind."""
    asked, found = client.execute(code), []
    while True:
        try:
            message = client.get_iopub_msg(timeout=240)
        except Empty:
            pytest.fail("the kernel says nothing any more")
        if message["parent_header"].get("msg_id") != asked:
            continue
        kind, content = message["msg_type"], message["content"]
        if kind == "status" and content["execution_state"] == "idle":
            return found
        found.append((kind, content))


def test_a_cell_shows_progress_and_images(kernel: Any, tmp_path: Path) -> None:
    found = messages(kernel, TRAIN.replace("FOLDER", repr(str(tmp_path))))
    assert [content for kind, content in found if kind == "error"] == []
    printed = {
        name: "".join(
            content["text"] for kind, content in found if kind == "stream" and content["name"] == name
        )
        for name in ("stdout", "stderr")
    }
    # the warning about a function of a notebook, and no library's word or loading bar
    [warning] = printed["stderr"].splitlines()
    assert warning.startswith("warning: reward <brightness> is an object that a checkpoint cannot name")
    shown = [content for kind, content in found if kind == "display_data"]
    updates = [content for kind, content in found if kind == "update_display_data"]
    # of the header, the progress and the summary, one is written over
    ids = {content["transient"]["display_id"] for content in [*shown, *updates] if content.get("transient")}
    assert len(ids) == 1
    lines = [content["data"]["text/plain"] for content in updates]
    assert any("2/2" in line and "held-out" in line for line in lines)
    assert lines[-1] == "2/2  done"
    assert "loop, K = 4" in printed["stdout"]
    assert "final reward" in printed["stdout"]
    # before training and after it
    assert len([content for content in shown if "image/png" in content["data"]]) == 2
    asked = messages(kernel, "len(run.metrics), run.report.exists()")
    [answer] = [content for kind, content in asked if kind == "execute_result"]
    assert answer["data"]["text/plain"] == "(3, True)"


def test_elsewhere_it_is_no_notebook_and_a_quiet_one_shows_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert not in_notebook()
    with NotebookDisplay(quiet=True) as display:
        display.header("title", [("a", "b")])
        display.start(3)
        display.phase("rollout")
        display.advance({"iteration": 1, "reward_mean": 1.0})
        display.image(Image.new("RGB", (2, 2)))
        display.finish([("a", "b")])
    assert capsys.readouterr().out == ""
