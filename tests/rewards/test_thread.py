"""Rewards in a thread or a process: the same scores and errors as without, and nothing left behind."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import loopfast.rewards.process as process_module
import loopfast.rewards.thread as worker_module
import loopfast.training.train as training
from loopfast.config import Config, RewardConfig
from loopfast.distributed.world import SINGLE_PROCESS
from loopfast.errors import ConfigError, Interrupted, RewardError
from loopfast.prompts import Prompt
from loopfast.rewards import RewardProcess, RewardThread, Scores, build_rewards
from loopfast.run.console import Display
from loopfast.run.folder import RunFolder
from loopfast.run.tracking import describe, read_metrics
from loopfast.training.scoring import Scoring
from tests.distributed.ranks import shared_ranks

MakeConfig = Callable[..., Config]
TERMS = [RewardConfig(name="jpeg_compressibility"), RewardConfig(name="embedded", weight=0.5)]
PROMPTS = [
    "a red circle",
    "a blue square and a red cross",
    "two green squares",
    "three green triangles",
    "a red cross and a green circle",
]
# Parts of three images and of one.
FEW = (
    "rollout.prompts_per_iteration=2",
    "rollout.steps=2",
    "rollout.microbatch=3",
    "train.microbatch=3",
    "train.iterations=1",
    "evaluation.limit_prompts=1",
)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "loopfast-reward"]


def images(count: int = 5) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class InAThread:
    """Takes the place of ``subprocess.Popen``: the process's side runs in this process."""

    def __init__(self, command: list[str], **_: Any) -> None:
        connection: Connection[Any, Any] = Connection(os.dup(int(command[-1])))
        self._thread = threading.Thread(target=process_module.answer_questions, args=(connection,))
        self._thread.start()

    def wait(self) -> int:
        self._thread.join(timeout=10)
        return 0


@pytest.fixture
def in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be a process, and import everything, is a thread."""
    monkeypatch.setattr(process_module, "subprocess", SimpleNamespace(Popen=InAThread, DEVNULL=None))


@contextmanager
def scoring(score: Callable[[Tensor, Any], Scores]) -> Iterator[RewardThread[str]]:
    worker: RewardThread[str] = RewardThread(score)
    try:
        yield worker
    finally:
        worker.close()


def brightness(found: Tensor, prompts: Any) -> Scores:
    values = found.mean((1, 2, 3))
    return Scores(values, {"brightness": values})


@pytest.mark.parametrize("reset", [True, False])
def test_a_process_whose_owner_was_killed_ends_without_a_word(reset: bool) -> None:
    ours, theirs = socket.socketpair()
    with Connection(theirs.detach()) as connection:
        if reset:
            connection.send_bytes(b"an answer that nobody reads")
        else:
            ours.send(b"\0\0")  # half of a message's length
        ours.close()
        process_module.answer_questions(connection)


def test_scores_of_parts_are_those_of_the_batch() -> None:
    rewards = build_rewards(TERMS)
    expected = rewards.score(images(), PROMPTS)
    with scoring(rewards.score) as worker, worker.batch():
        for part in (slice(0, 2), slice(2, 4), slice(4, 5)):
            worker.add(images()[part], PROMPTS[part])
        found = worker.result()
    assert torch.equal(found.total, expected.total)
    assert list(found.parts) == list(expected.parts)
    assert all(torch.equal(found.parts[name], part) for name, part in expected.parts.items())


def test_scoring_goes_on_beside_and_no_further_ahead_than_the_queue() -> None:
    go, called = threading.Semaphore(0), threading.Semaphore(0)

    def slow(found: Tensor, prompts: Any) -> Scores:
        called.release()
        assert go.acquire(timeout=10)
        return brightness(found, prompts)

    with scoring(slow) as worker, worker.batch():
        added = []

        def fill() -> None:
            for number in range(5):
                worker.add(images(1), [str(number)])
                added.append(number)

        other = threading.Thread(target=fill)
        other.start()
        assert called.acquire(timeout=10)
        while len(added) < 3:
            time.sleep(0.001)
        time.sleep(0.05)
        # one is being scored and two wait: the fourth has to
        assert added == [0, 1, 2]
        for _ in range(5):
            go.release()
        other.join(timeout=10)
        assert len(worker.result().total) == 5


def test_an_error_comes_out_where_the_next_part_goes_in_or_the_result_is_asked_for() -> None:
    def fails(found: Tensor, prompts: Any) -> Scores:
        raise RewardError("reward 'x' raised", [1])

    with scoring(fails) as worker, worker.batch():
        worker.add(images(), PROMPTS)
        with pytest.raises(RewardError, match="'x' raised") as caught:
            worker.result()
    assert caught.value.images_index == (1,)

    def add_for_ever() -> None:
        with scoring(fails) as worker, worker.batch():
            while True:
                worker.add(images(), PROMPTS)

    with pytest.raises(RewardError, match="'x' raised"):
        add_for_ever()


def test_what_waits_is_given_up_when_the_sampling_stops() -> None:
    scored = []

    def slow(found: Tensor, prompts: Any) -> Scores:
        scored.append(prompts)
        time.sleep(0.1)
        return brightness(found, prompts)

    def stopped() -> None:
        with scoring(slow) as worker, worker.batch():
            for number in range(3):
                worker.add(images(1), [str(number)])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert len(scored) <= 1


def test_one_thread_scores_all_batches_whatever_ends_one() -> None:
    threads = []

    def score(found: Tensor, prompts: Any) -> Scores:
        threads.append(threading.current_thread())
        if "fail" in prompts:
            raise RewardError("reward 'x' raised")
        return brightness(found, prompts)

    def batch(worker: RewardThread[str], *prompts: str) -> Tensor:
        with worker.batch():
            for prompt in prompts:
                worker.add(images(1), [prompt])
            return worker.result().total

    def interrupted(worker: RewardThread[str]) -> None:
        with worker.batch():
            worker.add(images(1), ["a"])
            raise KeyboardInterrupt

    expected = brightness(images(1), None).total
    with scoring(score) as worker:
        assert torch.equal(batch(worker, "a", "b"), expected.repeat(2))
        with pytest.raises(RewardError, match="'x' raised"):
            batch(worker, "a", "fail", "b")
        assert torch.equal(batch(worker, "a"), expected)
        with pytest.raises(KeyboardInterrupt):
            interrupted(worker)
        assert torch.equal(batch(worker, "a", "b", "c"), expected.repeat(3))
        [thread] = set(threads)
        assert thread.daemon
        assert thread.is_alive()
    assert not thread.is_alive()


def test_a_reward_that_never_returns_does_not_keep_the_thread_from_closing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_module, "_LAST_WAIT", 0.01)
    go, called = threading.Event(), threading.Event()

    def stuck(found: Tensor, prompts: Any) -> Scores:
        called.set()
        assert go.wait(timeout=20)
        return brightness(found, prompts)

    worker: RewardThread[str] = RewardThread(stuck)
    for _ in range(3):
        worker.add(images(1), ["a"])
    assert called.wait(timeout=10)
    [thread] = [thread for thread in threading.enumerate() if thread.name == "loopfast-reward"]
    worker.close()
    assert thread.is_alive()
    go.set()
    thread.join(timeout=10)


class OnGpu:
    """Images that say that they are on a GPU."""

    is_cuda = True

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        self.streams: list[Any] = []

    def record_stream(self, stream: Any) -> None:
        self.streams.append(stream)


def test_each_gpu_has_one_stream_for_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    devices, streams, scored_in = [], [], []

    @contextmanager
    def current(stream: Any) -> Iterator[None]:
        scored_in.append(stream)
        yield

    def stream(device: torch.device) -> Any:
        streams.append(SimpleNamespace(device=device, waited=[]))
        streams[-1].wait_event = streams[-1].waited.append
        return streams[-1]

    cuda: dict[str, Any] = {
        "Event": lambda: SimpleNamespace(record=lambda stream: None),
        "current_stream": lambda device: None,
        "set_device": devices.append,
        "Stream": stream,
        "stream": current,
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    parts: list[Any] = [OnGpu(index) for index in (1, 1, 0, 1)]
    with scoring(lambda found, prompts: Scores(torch.ones(1), {})) as worker:
        for part in parts:
            with worker.batch():
                worker.add(part, ["a"])
                worker.result()
    assert [stream.device for stream in streams] == [torch.device("cuda", 1), torch.device("cuda", 0)]
    assert devices == [part.device for part in parts]
    assert scored_in == [part.streams[0] for part in parts]
    assert all(stream.device == part.device for stream, part in zip(scored_in, parts, strict=True))
    assert [len(stream.waited) for stream in streams] == [3, 1]


@pytest.mark.gpu
def test_images_on_a_gpu_are_scored_in_one_stream_beside_the_sampling() -> None:
    streams = set()

    def score(found: Tensor, prompts: Any) -> Scores:
        assert torch.cuda.current_device() == found.get_device()
        streams.add(torch.cuda.current_stream().cuda_stream)
        return brightness(found.cpu(), prompts)

    with scoring(score) as worker:
        for _ in range(3):
            with worker.batch():
                # what is still being computed when it is handed over
                worker.add(torch.ones(4, 3, 512, 512, device="cuda").cumsum(0) / 4, ["a"] * 4)
                found = worker.result().total
            torch.testing.assert_close(found, torch.tensor([0.25, 0.5, 0.75, 1.0]))
    assert len(streams) == 1
    assert torch.cuda.current_stream().cuda_stream not in streams


USER = """\
import os, threading

threads = []

def pid(images, prompts, metadata):
    print("± what a reward prints fails it in no encoding")
    return [os.getpid()] * len(prompts)

def plain(images, prompts, metadata, fail=""):
    threads.append(threading.current_thread())
    values = images.mean((1, 2, 3))
    for index, prompt in enumerate(prompts):
        if metadata[index].get("die"):
            os._exit(7)
        if fail and fail in prompt:
            values[index] = float("nan")
    return values
"""


def test_a_process_scores_fails_and_ends_as_it_should(
    user_module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    module = user_module(USER)
    terms = [*TERMS, RewardConfig(name=f"{module}:plain", options={"fail": "cross"})]
    pid = RewardConfig(name=f"{module}:pid", weight=0.0)
    rewards = RewardProcess([*terms, pid])
    prompts = [prompt.replace("cross", "circle") for prompt in PROMPTS]
    expected = build_rewards(terms).score(images(), prompts)
    found = rewards.score(images(), prompts, [{"category": "color"}] * 5)
    assert torch.equal(found.total, expected.total)
    assert all(torch.equal(found.parts[name], part) for name, part in expected.parts.items())
    child = int(found.parts[pid.name][0])
    assert child != os.getpid()

    with pytest.raises(RewardError) as here:
        build_rewards(terms).score(images(), PROMPTS)
    with pytest.raises(RewardError) as there:
        rewards.score(images(), PROMPTS)
    assert str(there.value) == str(here.value)
    assert there.value.images_index == here.value.images_index == (1, 4)

    with pytest.raises(RewardError, match=r"metadata cannot be sent to their process .* use rollout"):
        rewards.score(images(1), PROMPTS[:1], [{"function": lambda: None}])
    assert rewards.score(images(1), PROMPTS[:1]).total.shape == (1,)
    with pytest.raises(RewardError, match=r"'embedded', .* ended with exit code 7"):
        rewards.score(images(2), PROMPTS[:2], [{"die": True}] * 2)
    rewards.close()
    rewards.close()


@pytest.mark.usefixtures("in_a_thread")
def test_a_process_has_the_gpu_of_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[Any] = [3]
    cuda: dict[str, Any] = {
        "is_initialized": lambda: True,
        "current_device": lambda: current[0],
        "set_device": lambda index: current.insert(0, ("set", index)),
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    rewards = RewardProcess(TERMS)
    try:
        assert current[0] == ("set", 3)
        assert rewards.score(images(), PROMPTS).total.shape == (5,)
    finally:
        rewards.close()


@pytest.mark.gpu
def test_a_process_scores_on_the_gpu_of_its_owner(user_module: Callable[[str], str]) -> None:
    module = user_module(
        "import torch\n"
        "def current(images, prompts, metadata):\n"
        "    return [torch.cuda.current_device()] * len(prompts)\n"
    )
    last = torch.cuda.device_count() - 1
    with torch.cuda.device(last):
        rewards = RewardProcess([RewardConfig(name=f"{module}:current")])
        found = rewards.score(images().cuda(), PROMPTS).total
        rewards.close()
    assert found.tolist() == [last] * 5


@pytest.mark.usefixtures("in_a_thread")
@pytest.mark.parametrize("wanted", [False, True])
def test_a_process_computes_in_the_precision_of_the_configuration(
    wanted: bool,
    small_config: MakeConfig,
    user_module: Callable[[str], str],
    tf32: Callable[[bool], None],
) -> None:
    tf32(not wanted)
    module = user_module(
        "import torch\n"
        "def flags(images, prompts, metadata):\n"
        "    found = torch.backends.cuda.matmul.allow_tf32 + torch.backends.cudnn.allow_tf32\n"
        "    return [found] * len(prompts)\n"
    )
    config = small_config(
        f"reward=[{{name: '{module}:flags'}}]",
        "rollout.reward_worker=process",
        f"model.tf32={str(wanted).lower()}",
    )
    judge = Scoring(
        config.reward,
        config.rollout,
        SINGLE_PROCESS,
        RunFolder(config),
        lambda text: None,
        tf32=config.model.tf32,
    )
    try:
        found = judge.score(images(1), [Prompt("a")]).total
    finally:
        judge.close()
    assert found.tolist() == [2.0 * wanted]


@pytest.mark.usefixtures("in_a_thread")
def test_a_process_that_cannot_start_says_why_and_ends() -> None:
    with pytest.raises(ConfigError, match="no reward 'beauty'; nearest:"):
        RewardProcess([RewardConfig(name="beauty")])


def test_a_process_ends_with_its_owner() -> None:
    """Even one that is killed."""
    program = (
        "import time\n"
        "from loopfast.config import RewardConfig\n"
        "from loopfast.rewards import RewardProcess\n"
        "rewards = RewardProcess([RewardConfig(name='jpeg_compressibility')])\n"
        "print(rewards._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    owner = shared_ranks()
    owner.start([], 1, before=program)
    owner.await_shown("\n")
    child = int(owner.shown(0))
    assert running(child)
    owner.kill()
    owner.wait()
    end = time.monotonic() + 20
    while running(child):
        assert time.monotonic() < end
        time.sleep(0.01)


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.usefixtures("in_a_thread")
def test_a_run_is_the_same_wherever_its_images_are_scored(
    small_config: MakeConfig, user_module: Callable[[str], str]
) -> None:
    module = user_module(USER)
    outcomes, threads = [], {}
    # on a CPU auto scores between the sampling
    for worker in ("none", "auto", "thread", "process"):
        config = small_config(
            *FEW,
            "train.iterations=2",
            "evaluation.every=0",
            f"rollout.reward_worker={worker}",
            f"reward=[{{name: jpeg_compressibility}}, {{name: '{module}:plain'}}]",
            f"run.name={worker}",
        )
        folder = training.train(config, display=Display(quiet=True))
        lines = [
            {name: value for name, value in line.items() if describe(name).section not in ("time", "speed")}
            for line in read_metrics(folder / "metrics.jsonl")
        ]
        for line in lines:
            del line["peak_memory_bytes"]
        outcomes.append(lines)
        [_, *timed] = read_metrics(folder / "metrics.jsonl")
        assert all(0 < line["seconds_reward"] < line["seconds_iteration"] for line in timed)
        calls = sys.modules[module].threads
        threads[worker] = set(calls) - {threading.main_thread()}
        calls.clear()
    assert outcomes[0] == outcomes[1] == outcomes[2] == outcomes[3]
    assert threads["none"] == threads["auto"] == set()
    # one for all iterations
    assert [thread.name for thread in threads["thread"]] == ["loopfast-reward"]


@pytest.mark.usefixtures("in_a_thread")
@pytest.mark.parametrize("worker", ["inline", "thread", "process"])
def test_a_reward_that_fails_in_a_later_part_names_itself_and_the_sample(
    worker: str, small_config: MakeConfig, user_module: Callable[[str], str], tmp_path: Path
) -> None:
    module = user_module(USER)
    (tmp_path / "prompts.txt").write_text("a red circle\na green ring\na blue square\na white star\n")
    (tmp_path / "easy.txt").write_text("a red circle\n")
    config = small_config(
        f"rollout.reward_worker={worker}",
        f"reward=[{{name: '{module}:plain', options: {{fail: star}}}}]",
        "prompts.source=prompts.txt",
        "evaluation.prompts=easy.txt",
        "evaluation.limit_prompts=1",
        "rollout.steps=2",
        "rollout.microbatch=2",
        "train.microbatch=2",
    )
    with pytest.raises(RewardError) as caught:
        training.train(config, display=Display(quiet=True))
    failures = Path(config.run.directory, "small", "failures", "iteration-000001")
    message = str(caught.value)
    assert message.startswith(f"iteration 1: reward '{module}:plain' is not finite for 2 of 2 image(s)")
    assert f"'a white star'; images and prompts are in {failures}; " in message
    assert list(json.loads((failures / "prompts.json").read_text()).values()) == ["a white star"] * 2


def test_a_signal_while_images_are_scored_leaves_no_thread(
    small_config: MakeConfig, user_module: Callable[[str], str]
) -> None:
    module = user_module(
        "import os, signal\n"
        "calls = 0\n"
        "def stop(images, prompts, metadata):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == 3:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return images.mean((1, 2, 3))\n"
    )
    options = (
        *FEW,
        f"reward=[{{name: '{module}:stop'}}]",
        "rollout.microbatch=2",
        "train.microbatch=2",
        "rollout.reward_worker=thread",
    )
    with pytest.raises(Interrupted) as caught:
        training.train(small_config(*options), display=Display(quiet=True))
    assert caught.value.exit_code == 143
    folder = training.train(small_config(*options), resume="auto", display=Display(quiet=True))
    whole = training.train(small_config(*options, "run.name=whole"), display=Display(quiet=True))
    names = ("reward_mean", "loss", "grad_norm")
    first, other = (read_metrics(path / "metrics.jsonl")[1] for path in (folder, whole))
    assert [first[name] for name in names] == [other[name] for name in names]
