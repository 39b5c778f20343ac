"""Places of a reward's weights: local folders and files, and those on the hub."""

from __future__ import annotations

from pathlib import Path

from loopfast.errors import ConfigError

__all__ = ["download", "is_file", "is_local", "require_file", "require_folder"]

_MODEL_FILES = ("config.json", "*.safetensors")


def is_local(source: str) -> bool:
    """True if ``source`` is a path, which exists or is written as one, and not a hub's ``owner/name``."""
    return Path(source).expanduser().exists() or source.startswith((".", "/", "~")) or "\\" in source


def is_file(source: str) -> bool:
    """True if ``source`` is a local file or one on the hub (``owner/name/file``), and not a model's folder or name."""
    if is_local(source):
        return not Path(source).expanduser().is_dir()
    return source.count("/") > 1


def require_folder(reward: str, key: str, source: str, *files: str) -> str:
    """Returns a model's local folder as a path, or its hub name, which is not looked up, as it is.

    Args:
        reward: name of the reward, for messages.
        key: name of its option, for messages.
        source: the option's value.
        files: patterns of files that a local folder must hold; default: ``config.json`` and weights as safetensors.

    Raises:
        ConfigError: ``source`` is neither a hub name nor a folder with these files.
    """
    where = f"reward {reward!r}: {key}: {source!r}"
    if not isinstance(source, str) or not source:
        raise ConfigError(f"reward {reward!r}: {key}: found {source!r}, allowed: a folder or a hub name")
    if not is_local(source):
        if source.count("/") > 1:
            raise ConfigError(f"{where} is neither a folder nor a hub name such as owner/name")
        return source
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{where} is not there; expected: a folder with a model's files, or a hub name")
    missing = [name for name in files or _MODEL_FILES if not any(folder.glob(name))]
    if missing:
        raise ConfigError(f"{where}: no {', '.join(missing)} in this folder; expected: a transformers model")
    return str(folder)


def require_file(reward: str, key: str, source: str) -> str:
    """Returns a local file as a path, or ``owner/name/file`` on the hub, which is not looked up, as it is.

    Raises:
        ConfigError: ``source`` is neither.
    """
    where = f"reward {reward!r}: {key}: "
    if not isinstance(source, str) or not source:
        raise ConfigError(f"{where}found {source!r}, allowed: a file, or owner/name/file on the hub")
    if is_local(source):
        path = Path(source).expanduser()
        if not path.is_file():
            raise ConfigError(f"{where}{source!r} is not there; expected: a file of weights")
        return str(path)
    if source.count("/") < 2:
        raise ConfigError(
            f"{where}{source!r} is not there, and is no file on the hub, such as owner/name/file"
        )
    return source


def download(source: str, revision: str | None) -> Path:
    """Returns the path of a file, which is downloaded if it is on the hub."""
    if is_local(source):
        return Path(source).expanduser()
    from huggingface_hub import hf_hub_download

    owner, name, file = source.split("/", 2)
    return Path(hf_hub_download(f"{owner}/{name}", file, revision=revision))
