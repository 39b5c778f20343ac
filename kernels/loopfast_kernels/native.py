"""The native library (C++), reached through its C interface by ctypes."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

_FILE_NAME = "libloopfast.so"


class NativeLibrary(NamedTuple):
    """What the loaded library says about itself and the processor."""

    path: Path
    version: str
    cpu_features: tuple[str, ...]


@lru_cache(maxsize=1)
def load() -> NativeLibrary | None:
    """Load the library installed beside this package.

    Returns:
        Its description, or None where the package runs from a source tree that was never installed.

    Raises:
        OSError: the file is there but cannot be loaded (built for another machine, damaged).
    """
    # An editable install keeps the library and the sources in different folders of one package.
    for folder in sys.modules[__package__].__path__:
        path = Path(folder) / _FILE_NAME
        if path.is_file():
            library = ctypes.CDLL(str(path))
            library.loopfast_version.restype = ctypes.c_char_p
            library.loopfast_cpu_features.restype = ctypes.c_char_p
            return NativeLibrary(
                path=path,
                version=library.loopfast_version().decode(),
                cpu_features=tuple(library.loopfast_cpu_features().decode().split()),
            )
    return None
