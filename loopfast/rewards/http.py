"""A reward on another machine, asked by HTTP; docs/reward-server.md describes the protocol."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from PIL import Image
from torch import Tensor

from loopfast.errors import RewardError, one_line
from loopfast.rewards.base import CountError, Reward

if TYPE_CHECKING:
    import requests

__all__ = ["http"]

LONGEST_WAIT = 60.0
"""Longest delay between two attempts in seconds, unless the server asks for more."""

LONGEST_ASKED = 600.0
"""Longest delay in seconds that a server's Retry-After can ask for."""


def http(
    url: str,
    timeout: float = 60.0,
    retries: int = 4,
    backoff: float = 0.5,
    concurrency: int = 4,
    batch_size: int = 16,
    token_env: str | None = None,
) -> Reward:
    """Score of a reward server, such as one started by ``loopfast serve-reward``.

    Args:
        url: address of ``/score`` and ``/health``, such as ``http://judge:8000``.
        timeout: seconds to wait for an answer.
        retries: number of further attempts of a request that finds no server, gets no answer in time, or is answered
            with 429 or 5xx; any other answer but 200 is an error at once.
        backoff: seconds before the second attempt, doubled for each further one, up to a minute, and drawn between half
            of that and all. A server's ``Retry-After`` is followed too, up to ten minutes.
        concurrency: requests at a time of each process of the run.
        batch_size: images in a request.
        token_env: the environment variable whose value is sent as ``Authorization: Bearer``.

    Raises:
        ValueError: an option has a value that is not allowed.
        RewardError: the server does not answer, does not accept the token, or takes fewer images in a request.
    """
    _require_url(url)
    for name, count, least in (
        ("retries", retries, 0),
        ("concurrency", concurrency, 1),
        ("batch_size", batch_size, 1),
    ):
        _require(type(count) is int and count >= least, name, count, f"a whole number from {least}")
    _require(_is_number(timeout) and timeout > 0, "timeout", timeout, "seconds above 0")
    _require(_is_number(backoff) and backoff >= 0, "backoff", backoff, "seconds from 0")
    token = None
    if token_env is not None:
        token = os.environ.get(token_env)
        _require(bool(token), "token_env", token_env, "an environment variable that is set")
    client = _Client(url.rstrip("/"), timeout, retries, backoff, token_env, _session(concurrency, token))
    client.require_health(batch_size)
    workers = ThreadPoolExecutor(concurrency, thread_name_prefix="loopfast-http")

    def reward(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        pixels = (images.float().nan_to_num(0) * 255).round().clamp(0, 255).to(torch.uint8)
        pixels = pixels.permute(0, 2, 3, 1).cpu()
        stop = threading.Event()
        answers = [
            workers.submit(client.scores, pixels[part], prompts[part], metadata[part], stop)
            for part in (slice(start, start + batch_size) for start in range(0, len(prompts), batch_size))
        ]
        try:
            done, _ = wait(answers, return_when=FIRST_EXCEPTION)
            failures = [error for answer in done if (error := answer.exception()) is not None]
            if failures:
                raise failures[0]
            return [score for answer in answers for score in answer.result()]
        finally:
            # after an error or Ctrl-C, no request begins, and none waits for another attempt
            stop.set()
            for answer in answers:
                answer.cancel()

    return reward


@dataclass
class _Client:
    url: str
    timeout: float
    retries: int
    backoff: float
    token_env: str | None
    session: requests.Session

    def require_health(self, batch_size: int) -> None:
        """Raises a `RewardError` unless the server answers and takes ``batch_size`` images in a request."""
        answer = self._ask("GET", "/health", None, threading.Event())
        most = _field(answer, "max_batch")  # a server need not have one
        if isinstance(most, int) and batch_size > most:
            raise RewardError(
                f"reward server {self.url}: batch_size: found {batch_size}, allowed: at most {most}, as it says"
            )

    def scores(
        self,
        pixels: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        stop: threading.Event,
    ) -> list[float]:
        """Returns the scores of uint8 images ``[N, H, W, 3]``; NaN for null."""
        try:
            body = json.dumps(
                {
                    "images": [_png(image.numpy()) for image in pixels],
                    "prompts": list(prompts),
                    "metadata": [dict(entry) for entry in metadata],
                }
            ).encode()
        except TypeError as error:
            raise RewardError(f"the prompts' metadata cannot be sent as JSON: {error}") from None
        answer = self._ask("POST", "/score", body, stop)
        scores = _field(answer, "scores")
        if not isinstance(scores, list) or not all(
            score is None or type(score) in (int, float) for score in scores
        ):
            raise RewardError(
                f"reward server {self.url} answered {one_line(answer.text)!r}, allowed: "
                '{"scores": [...]} with a number or null for each image'
            )
        if len(scores) != len(prompts):
            raise CountError(
                f"reward server {self.url} gave {len(scores)} score(s) for {len(prompts)} image(s)"
            )
        return [math.nan if score is None else score for score in scores]

    def _ask(self, method: str, path: str, body: bytes | None, stop: threading.Event) -> requests.Response:
        """Returns the server's answer of status 200, after as many attempts as it needs."""
        import requests

        for attempt in range(self.retries + 1):
            retry_after = 0.0
            try:
                answer = self.session.request(
                    method,
                    self.url + path,
                    data=body,
                    headers={"Content-Type": "application/json"} if body else {},
                    timeout=self.timeout,
                    allow_redirects=False,
                )
            except requests.exceptions.SSLError as error:
                raise RewardError(f"reward server {self.url}: {_cause(error)}") from None
            except requests.Timeout:
                problem = f"no answer within {self.timeout:g} s"
            except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
                problem = f"no connection: {_cause(error)}"
            except requests.RequestException as error:
                raise RewardError(f"reward server {self.url}: {error}") from None
            else:
                if answer.status_code == 200:
                    return answer
                reason = one_line(_field(answer, "error") or answer.text)
                problem = f"it answered {answer.status_code} {answer.reason}: {reason!r}"
                if answer.status_code != 429 and answer.status_code < 500:
                    raise RewardError(f"reward server {self.url}{path}: {problem}{self._hint(answer)}")
                retry_after = _retry_after(answer.headers.get("Retry-After"))
            # random, so that clients that were turned away together do not return together
            delay = min(self.backoff * 2.0**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0)
            if attempt < self.retries and stop.wait(max(retry_after, delay)):
                raise RewardError(f"reward server {self.url}: another request has failed")
        raise RewardError(f"reward server {self.url}{path}: {problem} ({self.retries + 1} attempt(s))")

    def _hint(self, answer: requests.Response) -> str:
        if answer.status_code not in (401, 403):
            return ""
        if self.token_env is None:
            return "; no token was sent, token_env is not given"
        return f"; the token sent is that of the environment variable {self.token_env}"


def _session(concurrency: int, token: str | None) -> requests.Session:
    import requests
    from requests.adapters import HTTPAdapter

    def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
        if token is not None:
            request.headers["Authorization"] = f"Bearer {token}"
        return request

    session = requests.Session()
    # a function, as requests would replace a header by the password of a ~/.netrc
    session.auth = authorize
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=concurrency))
    return session


def _png(pixels: Any) -> str:
    file = io.BytesIO()
    # sending more bytes takes less time than compressing them further
    Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _retry_after(header: str | None) -> float:
    """Returns the seconds that a Retry-After, a number or a date, asks for; 0 if it cannot be read."""
    if header is None:
        return 0.0
    if header.isascii() and header.isdigit():
        return min(float(header), LONGEST_ASKED)
    try:
        seconds = parsedate_to_datetime(header).timestamp() - time.time()
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), LONGEST_ASKED)


def _field(answer: requests.Response, name: str) -> Any:
    """Returns a value of an answer that is a JSON object; None if it has none of this name, or is something else."""
    try:
        return answer.json()[name]
    except (ValueError, KeyError, TypeError):
        return None


def _cause(error: BaseException) -> str:
    """Returns the innermost error of a failed connection."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return str(error) or type(error).__name__


def _require_url(url: object) -> None:
    parts = urlsplit(url if isinstance(url, str) else "")
    if parts.username is not None or parts.password is not None:
        raise ValueError("url: found one with a password in it, allowed: token_env for what is secret")
    _require(
        parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query and not parts.fragment,
        "url",
        url,
        "http://HOST:PORT or https://..., without a query",
    )


def _require(good: bool, name: str, found: object, allowed: str) -> None:
    if not good:
        raise ValueError(f"{name}: found {found!r}, allowed: {allowed}")
