"""The errors a user of loopfast can cause or meet.

The command line prints ``error: <message>`` and exits with ``exit_code``. So it does for an
``OSError`` that names a file. Anything else is a defect of loopfast and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = [
    "CallbackError",
    "CheckpointError",
    "ConfigError",
    "Interrupted",
    "LoopfastError",
    "MissingExtraError",
    "NonFiniteError",
    "PeerError",
    "RewardError",
    "RunExistsError",
    "WriteError",
    "as_config_error",
    "first_line",
    "one_line",
    "short",
]


def first_line(error: BaseException) -> str:
    """What an error of a library says, without the advice that follows; its class where it says nothing."""
    if isinstance(error, KeyError):
        return f"there is no {error}"
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def one_line(text: object, most: int = 200) -> str:
    """Text for a message: on one line, and cut off after ``most`` characters."""
    return short(" ".join(str(text).split()), most)


def short(text: str, most: int = 60) -> str:
    """Text cut off after ``most`` characters."""
    return text if len(text) <= most else text[: most - 3] + "..."


class LoopfastError(Exception):
    """Base of every error with a message written for the user.

    Attributes:
        exit_code: of the process.
        on_all_ranks: True if every rank raises it; rank 0 then prints it.
        printed_elsewhere: True if another process prints it.
    """

    exit_code: int = 1
    on_all_ranks: bool = False
    printed_elsewhere: bool = False


class ConfigError(LoopfastError):
    """The configuration or the command line cannot be used as given."""

    exit_code = 2


@contextmanager
def as_config_error(message: str, *kinds: type[Exception]) -> Iterator[None]:
    """Context that turns a library's error of these kinds into a `ConfigError`: the message and the error's line."""
    try:
        yield
    except kinds as error:
        raise ConfigError(f"{message}: {first_line(error)}") from error


class RunExistsError(ConfigError):
    """A new run would be written over another.

    Args:
        folder: of the run that is there.
        free_name: a name for the new one, which no run in the same directory has.
        resume, rename: how to go on with the one, and how to name the other; None: as options of the command line.
    """

    def __init__(
        self, folder: object, free_name: str, resume: str = "--resume auto", rename: str | None = None
    ) -> None:
        rename = rename or f"--set run.name={free_name}"
        super().__init__(
            f"{folder} already holds a run: go on with it ({resume}), or give this one another name ({rename})"
        )
        self.folder, self.free_name = folder, free_name

    def advising(self, resume: str, rename: str) -> RunExistsError:
        """The same error with other advice."""
        other = RunExistsError(self.folder, self.free_name, resume, rename)
        other.on_all_ranks, other.printed_elsewhere = self.on_all_ranks, self.printed_elsewhere
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.free_name), self.__dict__


class RewardError(LoopfastError):
    """A reward raised, or returned something that is not one finite number per image.

    Args:
        message: what to tell the user.
        images_index: positions, in the batch that was scored, of the samples at fault. Every position when
            the reward failed as a whole.
    """

    def __init__(self, message: str, images_index: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.images_index: tuple[int, ...] = tuple(images_index)


class CallbackError(LoopfastError):
    """A callback of the user's raised; what it raised is the cause."""


class CheckpointError(LoopfastError):
    """A checkpoint cannot be written, or one on disk is damaged."""


class NonFiniteError(LoopfastError):
    """A loss, gradient or log-probability is NaN or infinite.

    Args:
        message: what to tell the user.
        rows: the trajectories of the iteration that were involved.
    """

    def __init__(self, message: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows: tuple[int, ...] = tuple(rows)


class MissingExtraError(LoopfastError):
    """A command or feature needs packages that the base install does not bring.

    Args:
        feature: what was asked for, such as ``"loopfast train"``.
        extra: the extra of the distribution that brings the missing packages.
        package: the module that could not be imported, if known.
    """

    def __init__(self, feature: str, extra: str = "train", package: str | None = None) -> None:
        missing = f" (no module named {package!r})" if package else ""
        super().__init__(f"{feature} needs the extra {extra!r}{missing}: pip install 'loopfast[{extra}]'")
        self.extra = extra
        self.package = package


class WriteError(LoopfastError):
    """A file of the run cannot be written: the disk is full, or the folder is read-only."""


class PeerError(LoopfastError):
    """Another process of the group has ended, or does not answer; the message names its rank."""


class Interrupted(LoopfastError):  # noqa: N818 - being stopped is not an error
    """The run was stopped by a signal, after its state was saved.

    Args:
        message: what to tell the user, normally where the state was saved.
        exit_code: 129 for SIGHUP, 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code
