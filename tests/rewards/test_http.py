"""The reward ``http`` and its server, over real connections on this host."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
import uvicorn
from PIL import Image
from torch import Tensor

from loopfast.config import RewardConfig
from loopfast.errors import ConfigError, RewardError
from loopfast.rewards import RewardSet, RewardTerm, build_rewards
from loopfast.rewards.serve import reward_app
from tests.distributed.ranks import shared_ranks

PROMPTS = ["a red circle", "a blue square", "two green squares", "three green triangles", "a red cross"]


def images(count: int = 5, size: int = 32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@contextmanager
def served(rewards: RewardSet, **options: Any) -> Iterator[str]:
    """The address of the reference server with these rewards."""
    config = uvicorn.Config(reward_app(rewards, **options), port=0, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


Answer = Callable[["Scripted", dict[str, Any]], tuple[int, Any]]


class Scripted(ThreadingHTTPServer):
    """A server in other hands: what it answers to the nth batch is up to the test."""

    daemon_threads = True

    def __init__(self, answer: Answer, health: tuple[int, Any] = (200, {})) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.health = answer, health
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.batches: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.headers: dict[str, str] = {}
        self.lock = threading.Lock()
        self.now = self.most = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of who has gone meanwhile."""


class _Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_GET(self) -> None:
        self._reply(*self.server.health)

    def do_POST(self) -> None:
        server = self.server
        batch = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.batches.append(batch)
            server.times.append(time.monotonic())
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            status, content = server.answer(server, batch)
            if content is None:
                content = {"scores": [float(prompt) for prompt in batch["prompts"]]}
        finally:
            with server.lock:
                server.now -= 1
        self._reply(status, content)

    def _reply(self, status: int, content: Any) -> None:
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


@contextmanager
def scripted(answer: Answer, **options: Any) -> Iterator[Scripted]:
    server = Scripted(answer, **options)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def asking(url: str, **options: Any) -> RewardSet:
    given = {"url": url, "backoff": 0.01, **options}
    return build_rewards([RewardConfig(name="http", options=given)])


def test_scores_are_those_of_the_reward_here() -> None:
    terms = [
        RewardConfig(name="jpeg_compressibility"),
        RewardConfig(name="embedded", weight=3.0, normalize="range", range=(0.0, 0.5)),
    ]
    local = build_rewards(terms)
    rounded = (images() * 255).round() / 255
    with served(local, max_batch=2) as url:
        remote = asking(url, batch_size=2, concurrency=2)
        # the detector's sums are a library's, which may round calls of two images otherwise than those of five
        found, expected = remote.score(images(), PROMPTS).total, local.score(rounded, PROMPTS).total
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    # a reward of 8-bit images does not notice the way at all
    size = [RewardConfig(name="jpeg_compressibility", options={"quality": 80})]
    with served(build_rewards(size)) as url:
        found = asking(url).score(images(), PROMPTS).total
    assert torch.equal(found, build_rewards(size).score(images(), PROMPTS).total)
    assert len(found.unique()) == 5


def test_metadata_and_order_travel() -> None:
    def reward(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        return [entry.get("value", 0) + len(prompt) for prompt, entry in zip(prompts, metadata, strict=True)]

    with served(RewardSet([RewardTerm("mine", reward)])) as url:
        remote = asking(url, batch_size=1)
        found = remote.score(images(), PROMPTS, [{"value": 100 * index} for index in range(5)])
        assert found.total.tolist() == [len(p) + 100 * index for index, p in enumerate(PROMPTS)]
        with pytest.raises(RewardError, match="reward 'http': the prompts' metadata cannot be sent as JSON"):
            remote.score(images(1), PROMPTS[:1], [{"value": torch.zeros(1)}])
        assert remote.score(images(0), []).total.shape == (0,)


def test_one_reward_call_at_a_time_always_in_one_thread() -> None:
    lock = threading.Lock()
    threads = []

    def reward(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        assert lock.acquire(blocking=False)
        threads.append(threading.current_thread().name)
        time.sleep(0.02)
        lock.release()
        return images.mean((1, 2, 3))

    with served(RewardSet([RewardTerm("mine", reward)])) as url:
        found = asking(url, batch_size=1, concurrency=5, retries=0).score(images(), PROMPTS)
    assert found.total.shape == (5,)
    assert threads == ["loopfast-scoring_0"] * 5


@pytest.mark.parametrize("asked", [None, "1", "date"])
def test_a_server_that_fails_twice_is_asked_again(asked: str | None) -> None:
    def answer(server: Scripted, batch: dict[str, Any]) -> tuple[int, Any]:
        count = len(server.batches)
        server.headers = {}
        if count == 1 and asked:
            server.headers = {"Retry-After": formatdate(time.time() + 1) if asked == "date" else asked}
        return {1: (503, {"error": "still loading"}), 2: (429, "slow down")}.get(count, (200, None))

    with scripted(answer) as server:
        found = asking(server.url, retries=2).score(images(1), ["7"])
    assert found.total.tolist() == [7.0]
    assert len(server.batches) == 3
    if asked == "1":
        assert server.times[1] - server.times[0] >= 1.0


def test_the_waits_grow() -> None:
    with scripted(lambda server, batch: (500, {"error": "no luck"})) as server:
        rewards = asking(server.url, retries=3, backoff=0.1)
        with pytest.raises(RewardError) as caught:
            rewards.score(images(1), ["7"])
    assert f"reward 'http': reward server {server.url}/score: it answered 500" in str(caught.value)
    assert "'no luck' (4 attempt(s))" in str(caught.value)
    waits = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
    for wait, longest in zip(waits, (0.1, 0.2, 0.4), strict=True):
        assert longest / 2 <= wait < longest + 0.5


def test_what_the_server_does_not_like_is_not_repeated() -> None:
    with scripted(lambda server, batch: (422, {"error": "no such prompt"})) as server:
        rewards = asking(server.url)
        with pytest.raises(RewardError, match=r"it answered 422 .*: 'no such prompt'"):
            rewards.score(images(1), ["7"])
        assert len(server.batches) == 1
        server.answer = lambda server, batch: (307, "")
        with pytest.raises(RewardError, match="it answered 307"):
            rewards.score(images(1), ["7"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("<html>", "answered '<html>', allowed: {\"scores\": [...]}"),
        ([1.0], "answered '[1.0]', allowed"),
        ({"score": [1.0]}, "allowed"),
        ({"scores": ["1"]}, "allowed"),
        ({"scores": [True]}, "allowed"),
        ({"scores": [[1.0]]}, "allowed"),
        ({"scores": [1.0, 2.0]}, "gave 2 score(s) for 1 image(s)"),
        ({"scores": []}, "gave 0 score(s) for 1 image(s)"),
        ({"scores": [None]}, "is not finite for 1 of 1 image(s): nan for prompts '7'"),
        ('{"scores": [1e999]}', "is not finite for 1 of 1 image(s): inf for prompts '7'"),
    ],
)
def test_an_answer_that_is_none_names_the_server_and_what_came(content: Any, said: str) -> None:
    with scripted(lambda server, batch: (200, content)) as server:
        with pytest.raises(RewardError) as caught:
            asking(server.url).score(images(1), ["7"])
        assert said in str(caught.value)
        assert "reward 'http'" in str(caught.value)
        if "finite" not in said:
            assert server.url in str(caught.value)
        # the guard goes on without the images of which there is no score, and ends at what is no list of scores
        if "allowed" not in said:
            scores = asking(server.url).score(images(1), ["7"], keep_bad=True)
            assert scores.total.isnan().all()
            assert said in scores.problems["http"]


def slowly(server: Scripted, batch: dict[str, Any]) -> tuple[int, Any]:
    time.sleep(0.03)
    return 200, None


def test_so_many_requests_at_a_time_and_images_in_one() -> None:
    with scripted(slowly) as server:
        rewards = asking(server.url, concurrency=3, batch_size=2)
        found = rewards.score(images(17, 8), [str(number) for number in range(17)])
    assert found.total.tolist() == list(range(17))
    assert server.most == 3
    assert sorted(len(batch["prompts"]) for batch in server.batches) == [1, *[2] * 8]


def test_after_a_failure_nothing_more_is_asked() -> None:
    def fails(server: Scripted, batch: dict[str, Any]) -> tuple[int, Any]:
        return (400, "no") if batch["prompts"] == ["1"] else (503, "wait")

    with scripted(fails) as server:
        rewards = asking(server.url, concurrency=2, batch_size=1, backoff=30.0)
        began = time.monotonic()
        with pytest.raises(RewardError, match="it answered 400"):
            rewards.score(images(17, 8), [str(number) for number in range(17)])
        assert time.monotonic() - began < 25
        assert len(server.batches) <= 4
        # nor does anybody go on waiting to ask again: both are there for the next images
        time.sleep(0.1)
        server.most, server.answer = 0, slowly
        assert rewards.score(images(6, 8), list("345678")).total.tolist() == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
        assert server.most == 2


def test_after_ctrl_c_nobody_waits_to_ask_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()

    def busy(server: Scripted, batch: dict[str, Any]) -> tuple[int, Any]:
        asked.set()
        return 503, "wait"

    def interrupted(*_: Any, **__: Any) -> None:
        assert asked.wait(10)
        raise KeyboardInterrupt

    with scripted(busy) as server:
        rewards = asking(server.url, concurrency=1, batch_size=1, backoff=60.0)
        with monkeypatch.context() as patch:
            patch.setattr("loopfast.rewards.http.wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                rewards.score(images(3, 8), list("345"))
        # the one thread that asks is there for the next images
        server.answer = slowly
        assert rewards.score(images(1, 8), ["7"]).total.tolist() == [7.0]
        assert [batch["prompts"] for batch in server.batches] == [["3"], ["7"]]


def test_a_server_that_does_not_answer_in_time() -> None:
    go = threading.Event()

    def hangs(server: Scripted, batch: dict[str, Any]) -> tuple[int, Any]:
        go.wait(10)
        return 200, None

    with scripted(hangs) as server:
        rewards = asking(server.url, timeout=0.1, retries=1)
        with pytest.raises(RewardError, match=r"/score: no answer within 0\.1 s \(2 attempt"):
            rewards.score(images(1), ["7"])
        go.set()


def test_a_server_that_breaks_off_is_asked_again() -> None:
    def breaks(server: Scripted, batch: dict[str, Any]) -> tuple[int, Any]:
        if len(server.batches) == 1:
            raise BrokenPipeError
        return 200, None

    with scripted(breaks) as server:
        assert asking(server.url).score(images(1), ["7"]).total.tolist() == [7.0]


def test_a_server_that_is_down_is_known_at_the_start() -> None:
    with scripted(lambda server, batch: (200, None)) as server:
        url = server.url
    with pytest.raises(RewardError, match=rf"{url}/health: no connection: .*refused \(3 attempt"):
        asking(url, retries=2)
    with (
        scripted(lambda server, batch: (200, None), health=(404, "not here")) as server,
        pytest.raises(RewardError, match=r"/health: it answered 404 .*'not here'"),
    ):
        asking(server.url)


def test_the_token_comes_from_the_environment_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = build_rewards([RewardConfig(name="jpeg_compressibility")])
    with served(rewards, token="s3cret") as url:
        with pytest.raises(
            RewardError, match=r"it answered 401 .*; no token was sent, token_env is not given"
        ):
            asking(url)
        monkeypatch.setenv("JUDGE", "guess")
        with pytest.raises(
            RewardError, match=r"it answered 401 .*that of the environment variable JUDGE"
        ) as caught:
            asking(url, token_env="JUDGE")
        assert "guess" not in str(caught.value)
        monkeypatch.setenv("JUDGE", "s3cret")
        assert asking(url, token_env="JUDGE").score(images(1), ["x"]).total.shape == (1,)
        assert requests.post(f"{url}/score", data="no JSON", timeout=9).status_code == 401
    monkeypatch.delenv("JUDGE")
    with pytest.raises(
        ConfigError, match="token_env: found 'JUDGE', allowed: an environment variable that is set"
    ):
        asking(url, token_env="JUDGE")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": "judge:8000"}, "url: found 'judge:8000', allowed: http://HOST:PORT"),
        ({"url": 3}, "url: found 3"),
        ({"url": "http://me:secret@judge"}, "url: found one with a password in it, allowed: token_env"),
        ({"url": "http://judge/?a=b"}, "without a query"),
        ({"timeout": 0}, "timeout: found 0, allowed: seconds above 0"),
        ({"timeout": math.inf}, "timeout: found inf"),
        ({"backoff": -1.0}, "backoff: found -1.0, allowed: seconds from 0"),
        ({"retries": -1}, "retries: found -1, allowed: a whole number from 0"),
        ({"retries": True}, "retries: found True"),
        ({"concurrency": 0}, "concurrency: found 0, allowed: a whole number from 1"),
        ({"batch_size": 1.5}, "batch_size: found 1.5"),
        ({"port": 3}, "unexpected keyword argument 'port'"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        asking(**{"url": "http://judge", **options})
    assert said in str(caught.value)


def test_more_images_in_a_request_than_the_server_takes() -> None:
    rewards = build_rewards([RewardConfig(name="jpeg_compressibility")])
    with (
        served(rewards, max_batch=8) as url,
        pytest.raises(RewardError, match="batch_size: found 16, allowed: at most 8, as it says"),
    ):
        asking(url)


def png(height: int = 4, width: int = 6, mode: str = "RGB", form: str = "PNG") -> str:
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 9, np.uint8)).convert(mode).save(file, form)
    return base64.b64encode(file.getvalue()).decode()


def test_the_server_says_what_is_wrong_with_a_request() -> None:
    rewards = build_rewards([RewardConfig(name="jpeg_compressibility")])
    good = {"images": [png()], "prompts": ["a"]}
    with served(rewards, max_batch=2, max_body=20_000) as url:

        def asked(body: Any) -> tuple[int, Any]:
            data = body if isinstance(body, str) else json.dumps(body)
            answer = requests.post(f"{url}/score", data=data, timeout=9)
            return answer.status_code, answer.json()

        status, answer = asked(good)
        assert (status, list(answer), len(answer["scores"])) == (200, ["scores"], 1)
        assert asked({"images": [png(mode="L"), png(mode="P")], "prompts": ["a", "b"]})[0] == 200
        assert asked({"images": [], "prompts": [], "metadata": []}) == (200, {"scores": []})
        for change, expected, said in (
            ("{", 400, "the body is not JSON"),
            ([], 400, "the body: allowed: an object with images, prompts and metadata"),
            ({"images": "x"}, 400, "images: allowed: a list of texts"),
            ({"images": [3]}, 400, "images: allowed: a list of texts"),
            ({"prompts": ["a", "b"]}, 400, "prompts: found 2, allowed: 1, one for each image"),
            ({"prompts": None}, 400, "prompts: allowed: a list of texts"),
            ({"metadata": [3]}, 400, "metadata: allowed: a list of objects"),
            ({"images": ["@@@"]}, 400, "images: number 0 is not a PNG in base64 (Error: "),
            ({"images": [png()[:60]]}, 400, "images: number 0 is not a PNG in base64 ("),
            ({"images": [png(form="JPEG")]}, 400, "images: number 0 is not a PNG in base64 ("),
            ({"images": [png(), png(5)], "prompts": ["a", "b"]}, 400, "found sizes 6x4, 6x5, allowed: one"),
            ({"images": [png()] * 3, "prompts": ["a"] * 3}, 413, "images: found 3, allowed: at most 2"),
            ({"prompts": ["a" * 30_000]}, 413, "bytes, allowed: at most 20000"),
        ):
            body = {**good, **change} if isinstance(change, dict) else change
            status, answer = asked(body)
            assert status == expected, (change, answer)
            assert said in answer["error"]
        for method, path in (("GET", "/score"), ("POST", "/health"), ("GET", "/")):
            answer = requests.request(method, url + path, timeout=9)
            assert answer.status_code in (404, 405)
            assert answer.json()["error"] == f"{method} {path}: allowed: POST /score, GET /health"
        health = requests.get(f"{url}/health", timeout=9).json()
    assert health == {"status": "ok", "reward": "jpeg_compressibility", "max_batch": 2}


def test_a_reward_that_fails_there_is_told_here() -> None:
    def reward(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        if prompts == ["bad"]:
            return [math.nan]
        if prompts == ["large"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        raise KeyError("beauty")

    with served(RewardSet([RewardTerm("mine", reward)])) as url:
        remote = asking(url, retries=1)
        with pytest.raises(
            RewardError, match=r"it answered 500 .*: \"reward 'mine' raised KeyError: 'beauty'"
        ):
            remote.score(images(1), ["a"])
        with pytest.raises(
            RewardError, match=r"it answered 500 .*: \"reward 'mine' ran out of memory on cpu"
        ):
            remote.score(images(1), ["large"])
        with pytest.raises(RewardError, match="reward 'http' is not finite for 1 of 1"):
            remote.score(images(1), ["bad"])


def test_the_server_of_the_documentation_serves() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reward-server.md").read_text("utf-8")
    [program] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    program, _, last = program.strip().rpartition("\n")
    assert last == 'ThreadingHTTPServer(("127.0.0.1", 8000), Brightness).serve_forever()'
    names: dict[str, Any] = {}
    exec(program, names)
    names["Brightness"].log_message = lambda *args: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), names["Brightness"])
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        found = asking(f"http://127.0.0.1:{server.server_port}").score(images(), PROMPTS).total
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    torch.testing.assert_close(found, images().mean((1, 2, 3)), rtol=0, atol=1e-3)


def test_the_command_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time, torch\n"
        "def reward(images, prompts, metadata, scale):\n"
        "    open('called', 'w').close()\n"
        "    time.sleep(0.5)\n"
        "    assert not torch.backends.cudnn.allow_tf32, 'convolutions are not IEEE float32'\n"
        "    return images.mean((1, 2, 3)) * scale\n"
    )
    command = ["serve-reward", "slow:reward", "--option", "scale=2.0", "--port", "0", "--token-env", "TOKEN"]
    here = f"import os, sys\nos.chdir({str(tmp_path)!r})\nsys.path.insert(0, '')\n"
    process = shared_ranks()
    process.start(command, 1, before=here, environment={"TOKEN": "t"})
    process.await_shown("\n")
    name, _, url = process.shown(0).splitlines()[0].rpartition(": ")
    assert name == "slow:reward"
    found: list[Any] = []
    body = {"images": [png()], "prompts": ["a"]}
    bearer = {"Authorization": "Bearer t"}

    def ask() -> None:
        found.append(requests.post(f"{url}/score", json=body, headers=bearer, timeout=30).json())

    thread = threading.Thread(target=ask)
    thread.start()
    while thread.is_alive() and not (tmp_path / "called").exists():
        time.sleep(0.01)
    process.kill(signal.SIGTERM)
    thread.join()
    assert found[0]["scores"] == [pytest.approx(2 * 9 / 255)]
    assert process.wait() == [0]
