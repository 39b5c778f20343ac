"""The errors a user of loopfast can cause or meet.

The command line prints ``error: <message>`` and exits with ``exit_code``. It does the same for an ``OSError`` with a
file name. Any other error is a defect of loopfast and keeps its traceback.
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
    """Returns the first line of a library's error, or the name of its class if it has no message."""
    if isinstance(error, KeyError):
        return f"there is no {error}"
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def one_line(text: object, most: int = 200) -> str:
    """Returns text on one line for a message, cut off after ``most`` characters."""
    return short(" ".join(str(text).split()), most)


def short(text: str, most: int = 60) -> str:
    """Returns text, cut off after ``most`` characters."""
    return text if len(text) <= most else text[: most - 3] + "..."


class LoopfastError(Exception):
    """Base of every error with a message written for the user.

    Attributes:
        exit_code: the exit status of the process.
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
    """A new run would overwrite another.

    Args:
        folder: the folder of the existing run.
        free_name: a name for the new run that no run in the same directory has.
        resume: the way to resume the existing run, for the message.
        rename: the way to name the new run, for the message. None gives the command line's option.
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
        """Returns the same error with other advice."""
        other = RunExistsError(self.folder, self.free_name, resume, rename)
        other.on_all_ranks, other.printed_elsewhere = self.on_all_ranks, self.printed_elsewhere
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.free_name), self.__dict__


class RewardError(LoopfastError):
    """A reward raised, or returned something that is not one finite number per image.

    Args:
        message: the message for the user.
        images_index: the positions of the samples at fault in the scored batch. If the reward failed as a whole, these
            are all positions.
    """

    def __init__(self, message: str, images_index: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.images_index: tuple[int, ...] = tuple(images_index)


class CallbackError(LoopfastError):
    """A user's callback raised an error, which is the cause of this one."""


class CheckpointError(LoopfastError):
    """A checkpoint cannot be written, or one on disk is damaged."""


class NonFiniteError(LoopfastError):
    """A loss, gradient or log-probability is NaN or infinite.

    Args:
        message: the message for the user.
        rows: the trajectories of the iteration that were involved.
    """

    def __init__(self, message: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows: tuple[int, ...] = tuple(rows)


class MissingExtraError(LoopfastError):
    """A command or feature needs packages that the base installation does not have.

    Args:
        feature: the command or feature, such as ``"loopfast train"``.
        extra: the distribution's extra that has the missing packages.
        package: the module that could not be imported. None if it is not known.
    """

    def __init__(self, feature: str, extra: str = "train", package: str | None = None) -> None:
        missing = f" (no module named {package!r})" if package else ""
        super().__init__(f"{feature} needs the extra {extra!r}{missing}: pip install 'loopfast[{extra}]'")
        self.extra = extra
        self.package = package


class WriteError(LoopfastError):
    """A file of the run cannot be written: the disk is full, or the folder is read-only."""


class PeerError(LoopfastError):
    """Another process of the run has ended or does not answer; the message names its rank."""


class Interrupted(LoopfastError):  # noqa: N818 - being stopped is not an error
    """The run was stopped by a signal, after its state was saved.

    Args:
        message: the message for the user, normally with the place of the saved state.
        exit_code: 129 for SIGHUP, 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code
