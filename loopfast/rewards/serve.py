"""A server for the reward ``http``, which scores by any rewards of a configuration; see docs/reward-server.md."""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
import json
import logging
import math
import signal
import socket
import warnings
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from loopfast.errors import LoopfastError, MissingExtraError, RewardError
from loopfast.rewards.base import RewardSet, Scores
from loopfast.rewards.fitting import RewardMemoryError

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse

__all__ = ["reward_app", "serve_rewards"]

_log = logging.getLogger(__name__)


class _Refused(Exception):  # noqa: N818 - an answer
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def reward_app(
    rewards: RewardSet, *, token: str | None = None, max_batch: int = 64, max_body: int = 64 * 2**20
) -> Starlette:
    """Makes the ASGI application that answers ``POST /score`` and ``GET /health``.

    Args:
        rewards: the rewards, whose weighted sum is the answer; called in one thread, as cuDNN keeps its plans per
            thread.
        token: token that every request must have in its header ``Authorization: Bearer``; None requires none.
        max_batch: largest number of images in a request.
        max_body: largest number of bytes of a request.

    Raises:
        MissingExtraError: the extra ``serve`` is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.concurrency import run_in_threadpool
        from starlette.exceptions import HTTPException
        from starlette.responses import JSONResponse
        from starlette.routing import Route
    except ImportError as error:
        raise MissingExtraError("loopfast serve-reward", "serve", error.name) from error
    title = " + ".join(term.name for term in rewards.terms)
    worker = ThreadPoolExecutor(1, thread_name_prefix="loopfast-scoring")

    async def health(request: Request) -> JSONResponse:
        _require_token(request, token)
        return JSONResponse({"status": "ok", "reward": title, "max_batch": max_batch})

    async def score(request: Request) -> JSONResponse:
        _require_token(request, token)
        body = await _read(request.stream(), max_body)
        images, prompts, metadata = await run_in_threadpool(_parse, body, max_batch)
        if not prompts:
            return JSONResponse({"scores": []})
        asked = partial(rewards.score, images, prompts, metadata, keep_bad=True)
        scores: Scores = await asyncio.get_running_loop().run_in_executor(worker, asked)
        for problem in scores.problems.values():
            _log.warning("%s", problem)
        values = scores.total.tolist()
        return JSONResponse({"scores": [value if math.isfinite(value) else None for value in values]})

    def refused(request: Request, error: Exception) -> JSONResponse:
        status = error.status if isinstance(error, _Refused) else 500
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
        if status == 500:
            _log.error("%s", error)
        return JSONResponse({"error": str(error)}, status, headers)

    def unknown(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: allowed: POST /score, GET /health"
        return JSONResponse({"error": message}, error.status_code)

    return Starlette(
        routes=[Route("/score", score, methods=["POST"]), Route("/health", health, methods=["GET"])],
        exception_handlers={
            HTTPException: unknown,
            **dict.fromkeys((_Refused, RewardError, RewardMemoryError), refused),
        },
    )


def serve_rewards(app: Starlette, *, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serves an application of `reward_app` until SIGINT or SIGTERM, then finishes the requests that it is answering.

    Float32 is IEEE float32 on a GPU, as in a run without ``model.tf32``.

    Args:
        app: the application.
        host, port: the address to listen at; port 0 takes any that is free.
        say: called with the address, once the server answers there.

    Raises:
        MissingExtraError: the extra ``serve`` is not installed.
        LoopfastError: the server cannot listen at the address.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtraError("loopfast serve-reward", "serve", error.name) from error
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise LoopfastError(f"cannot listen at {host} port {port}: {error.strerror or error}") from error
    shown = f"[{host}]" if ":" in host else host
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    # after it has ended, the server sends the signal that ended it to itself
    previous = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        with listener:
            say(f"http://{shown}:{listener.getsockname()[1]}")
            server.run(sockets=[listener])
    except KeyboardInterrupt:
        say("stopped")
    finally:
        signal.signal(signal.SIGTERM, previous)


def _require_token(request: Request, token: str | None) -> None:
    if token is None:
        return
    header = request.headers.get("authorization", "")
    if not hmac.compare_digest(header.encode(), f"Bearer {token}".encode()):
        raise _Refused(401, "Authorization: found no or another token, allowed: Bearer and the server's")


async def _read(parts: AsyncIterator[bytes], most: int) -> bytes:
    """Returns the body. One that is too long is read to its end, so that the client gets the answer."""
    body, size = bytearray(), 0
    async for part in parts:
        size += len(part)
        if size <= most:
            body += part
    if size > most:
        raise _Refused(413, f"the body: found {size} bytes, allowed: at most {most}")
    return bytes(body)


def _parse(body: bytes, max_batch: int) -> tuple[Tensor, list[str], list[dict[str, Any]]]:
    """Returns the images, float32 ``[N, 3, H, W]`` in [0, 1], prompts and metadata of a request."""
    try:
        asked = json.loads(body)
    except ValueError as error:
        raise _Refused(400, f"the body is not JSON: {error}") from None
    if not isinstance(asked, dict):
        raise _Refused(400, "the body: allowed: an object with images, prompts and metadata")
    images = _list(asked.get("images"), "images", str, None)
    prompts = _list(asked.get("prompts"), "prompts", str, len(images))
    metadata = asked.get("metadata")
    metadata = [{} for _ in images] if metadata is None else _list(metadata, "metadata", dict, len(images))
    if len(images) > max_batch:
        raise _Refused(413, f"images: found {len(images)}, allowed: at most {max_batch} in a request")
    pixels = [_pixels(image, index) for index, image in enumerate(images)]
    sizes = {image.shape for image in pixels}
    if len(sizes) > 1:
        found = ", ".join(f"{width}x{height}" for height, width, _ in sorted(sizes))
        raise _Refused(400, f"images: found sizes {found}, allowed: one size in a request")
    stacked = torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0, 1, 1, 3)
    return stacked.permute(0, 3, 1, 2).float() / 255, prompts, metadata


def _list(found: Any, name: str, kind: type, count: int | None) -> list[Any]:
    if not isinstance(found, list) or not all(isinstance(item, kind) for item in found):
        raise _Refused(400, f"{name}: allowed: a list of {'texts' if kind is str else 'objects'}")
    if count is not None and len(found) != count:
        raise _Refused(400, f"{name}: found {len(found)}, allowed: {count}, one for each image")
    return found


def _pixels(text: str, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Decodes a PNG in base64 to uint8 ``[H, W, 3]``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            data = base64.b64decode(text, validate=True)
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, RuntimeWarning) as error:
        reason = f"{type(error).__name__}: {error}"
        raise _Refused(400, f"images: number {index} is not a PNG in base64 ({reason})") from None
