"""Rewards in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopfast.config import RewardConfig
from loopfast.errors import LoopfastError, RewardError
from loopfast.rewards.base import Scores
from loopfast.system.streams import open_streams

_PROGRAM = "from loopfast.rewards.process import serve; serve()"


class RewardProcess:
    """Rewards of a configuration in another process, which score and fail as those of a `RewardSet` do.

    What a reward computes in Python then runs beside the sampling. Images, prompts, metadata and scores are copied
    between the two processes. The other process ends with this object, and with the process that made it, even if that
    is killed. Ctrl-C does not reach it. Its current GPU is that of its parent: rewards whose device is ``auto`` or
    ``cuda`` use that one.

    `concurrent.futures.ProcessPoolExecutor` would not do: its process fails for a script without a ``__main__`` guard,
    and outlives a parent that is killed.

    Args:
        terms: the rewards to build.
        tf32: whether they multiply and convolve float32 in TF32 on a GPU.

    Raises:
        ConfigError: a reward does not exist, cannot be imported, or does not take the options given.
        RewardMemoryError: weights do not fit into a GPU's memory.
    """

    def __init__(self, terms: Sequence[RewardConfig], *, tf32: bool = False) -> None:
        self._names = ", ".join(repr(term.title) for term in terms)
        connection, child_connection = Pipe()
        with child_connection:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(child_connection.fileno())],
                pass_fds=[child_connection.fileno()],
                # the process finds the modules that this one finds, those beside the user's program too
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
                },
                start_new_session=True,
                stdin=subprocess.DEVNULL,
            )
        self._connection: Connection[Any, Any] = connection
        self.close = weakref.finalize(self, _end, connection, self._process)
        """Ends the process, once the reward that it is calling has returned. A second call does nothing."""
        # asking for the current GPU would start CUDA; before that it is the first one, as in the new process
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._ask((list(terms), gpu, tf32))

    def score(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]] | None = None,
        *,
        keep_bad: bool = False,
    ) -> Scores:
        """Scores a batch; see `RewardSet.score`.

        Raises:
            RewardError: as in `RewardSet.score`, or the metadata cannot be sent, or the process has ended.
            RewardMemoryError: as in `RewardSet.score`.
        """
        entries = None if metadata is None else [dict(entry) for entry in metadata]
        try:
            total, parts, problems = self._ask(
                (images.detach().cpu().numpy(), list(prompts), entries, keep_bad)
            )
        except (TypeError, AttributeError, ValueError) as error:
            if "pickle" not in str(error):
                raise
            raise RewardError(
                f"rewards {self._names}: the prompts' metadata cannot be sent to their process ({error}); use "
                "rollout.reward_worker=thread",
                range(len(prompts)),
            ) from error
        named = {name: torch.from_numpy(part) for name, part in parts.items()}
        return Scores(torch.from_numpy(total), named, problems)

    def _ask(self, question: object) -> Any:
        """Returns the answer of the process, or raises it if it is an error."""
        try:
            self._connection.send(question)
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            code = self._process.wait()
            raise RewardError(
                f"the process of the rewards {self._names} ended with exit code {code}; its last output is above"
            ) from error
        if isinstance(answer, LoopfastError):
            raise answer
        return answer


def serve() -> None:
    """Runs in the new process; see `answer_questions`."""
    open_streams(keep_going=True)
    answer_questions(Connection(int(sys.argv[1])))


def answer_questions(connection: Connection[Any, Any]) -> None:
    """Builds rewards from the first message, then scores until the other end is closed."""
    from loopfast.rewards.registry import build_rewards

    rewards = None
    while True:
        try:
            question = connection.recv()
        except (EOFError, OSError):  # reset, or in the middle of a message, where the other end was killed
            return
        answer: Any = None
        try:
            if rewards is None:
                terms, gpu, tf32 = question
                if gpu is not None:
                    torch.cuda.set_device(gpu)
                # a run's setting holds for its process; PyTorch's default would convolve in TF32
                torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
                rewards = build_rewards(terms)
            else:
                images, prompts, metadata, keep_bad = question
                scores = rewards.score(torch.from_numpy(images), prompts, metadata, keep_bad=keep_bad)
                parts = {name: part.numpy() for name, part in scores.parts.items()}
                answer = scores.total.numpy(), parts, dict(scores.problems)
        except LoopfastError as error:
            answer = error
        try:
            connection.send(answer)
        except OSError:  # nobody is waiting any more
            return


def _end(connection: Connection[Any, Any], process: subprocess.Popen[bytes]) -> None:
    connection.close()
    process.wait()
