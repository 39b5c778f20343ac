"""The console script ``loopfast``, also ``python -m loopfast``.

It needs only the standard library, so that a base install can report what is missing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

# before torch is imported: it would print a backtrace for each connection to a process that has died
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from loopfast.errors import Interrupted, LoopfastError, MissingExtraError, one_line
from loopfast.system.allocator import reuse_freed_memory
from loopfast.system.streams import lost_output, open_streams, printed_by_another

__all__ = ["main"]

# Commands whose result is not their output: they do not fail if stdout does.
_KEEP_GOING = ("train", "launch", "serve-reward")

# Modules that come with an extra of the distribution, not with the base install.
_MODULES = """
    PIL accelerate diffusers jinja2 matplotlib numpy nvtx peft pydantic rich safetensors tensorboard transformers typer
    yaml
"""
_EXTRA_OF_MODULE = {**dict.fromkeys(_MODULES.split(), "train"), "deepspeed": "zero3", "wandb": "wandb"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: the arguments without the program's name; None uses those of the process.

    Returns:
        The exit code: 0 success, 1 failure, 2 wrong usage or configuration, 129, 130 or 143 stopped by a signal.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    open_streams(keep_going=command in _KEEP_GOING)
    reuse_freed_memory()
    code = _run(arguments)
    lost = lost_output()
    if lost is None or command in _KEEP_GOING:
        return code
    print(f"error: cannot write to stdout: {lost}", file=sys.stderr)
    return code or 1


def _run(arguments: list[str]) -> int:
    try:
        try:
            from loopfast.cli import app
        except ModuleNotFoundError as error:
            if arguments != ["doctor"] or _top_level(error) not in _EXTRA_OF_MODULE:
                raise
            from loopfast.system.doctor import examine

            print(examine())
            return 0
        app(args=arguments, prog_name="loopfast")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except LoopfastError as error:
        return _fail(error)
    except KeyboardInterrupt:  # while the command line is imported
        return _fail(Interrupted("interrupted"))
    except OSError as error:
        if error.filename is None:
            raise
        # such as a name that is too long, or a folder without permission to read
        return _fail(LoopfastError(f"{error.strerror}: {one_line(repr(error.filename))}"))
    except ModuleNotFoundError as error:
        module = _top_level(error)
        if module not in _EXTRA_OF_MODULE:
            raise
        command = " ".join(["loopfast", *arguments[:1]])
        return _fail(MissingExtraError(command, _EXTRA_OF_MODULE[module], module))
    return 0


def _top_level(error: ModuleNotFoundError) -> str:
    return (error.name or "").partition(".")[0]


def _fail(error: LoopfastError) -> int:
    if not error.printed_elsewhere and not printed_by_another(str(error)):
        print(f"error: {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
