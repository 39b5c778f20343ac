"""A reward of the user's own, named ``module:function``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from loopfast.errors import ConfigError
from loopfast.rewards.base import Reward
from loopfast.system.plugins import import_function

__all__ = ["checked_reward", "user_reward"]

_ALLOWED = "a function or object that takes images, prompts and metadata and returns a number for each image"
# callables that return no numbers
_OTHER_KINDS: dict[Callable[[Any], bool], str] = {
    inspect.isclass: "a class and not an object of it",
    inspect.iscoroutinefunction: "an async function",
    inspect.isasyncgenfunction: "an async generator",
    inspect.isgeneratorfunction: "a generator",
}


def user_reward(reference: str, options: Mapping[str, Any]) -> Reward:
    """Imports the function that ``module:function`` names, and binds ``options`` as keyword arguments.

    It is called as ``function(images, prompts, metadata, **options)``; see `Reward`. It may be any callable, such as an
    object that holds a model in memory.

    Raises:
        ConfigError: the function cannot be imported or cannot be called with these arguments.
    """
    try:
        function = import_function(reference)
    except ConfigError as error:
        raise ConfigError(f"reward {error}") from error.__cause__
    return checked_reward(reference, function, options)


def checked_reward(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> Reward:
    """Binds ``options`` as keyword arguments of a user's function.

    Raises:
        ConfigError: the function cannot be called as a reward; the message names it by ``name``.
    """
    for test, what in _OTHER_KINDS.items():
        if test(function):
            raise ConfigError(f"reward {name!r} is {what}; allowed: {_ALLOWED}")
    try:
        signature = inspect.signature(function)
    except ValueError:
        pass  # a builtin without a signature: a wrong one fails at the first call
    else:
        try:
            signature.bind("images", "prompts", "metadata", **options)
        except TypeError as error:
            arguments = ", ".join(["images", "prompts", "metadata", *(f"{key}=..." for key in options)])
            raise ConfigError(
                f"reward {name!r}, which takes {signature}, cannot be called with ({arguments}): {error}; "
                f"allowed: {_ALLOWED}"
            ) from None
    return functools.partial(function, **options) if options else function
