"""Functions and modules of a user's own, by ``module:name`` or ``file.py:name``. A module is installed, or lies in the working folder."""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anabranch.errors import ConfigError

__all__ = ["own_function", "own_module"]


def own_function(name: str, *, what: str, called_with: str) -> tuple[Callable[..., Any], str]:
    """The function of a name, and what tells it from what it was before it was changed: its attribute ``name``, else its file's content.

    Args:
        name: ``module:name`` or ``file.py:name``.
        what: it is, for errors.
        called_with: likewise.

    Raises ConfigError for a name without a colon, one that cannot be loaded, and what cannot be called.
    """
    module, colon, attribute = name.rpartition(":")
    if not colon:
        raise ConfigError(f"{what} {name!r} names no function; write module:name or file.py:name")
    try:
        loaded = _module(module)
        found = getattr(loaded, attribute)
    # Whatever code of a user's raises while it is loaded, or ends by.
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{what} {name!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ConfigError(f"{what} {name!r} is a {type(found).__name__}; it must be called with {called_with}")
    return found, _version(found, loaded)


def _module(name: str) -> Any:
    """The module of a name, or of a file of Python."""
    if not name.endswith(".py"):
        try:
            return own_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0]:
                raise
            raise ModuleNotFoundError(f"{error}; write file.py:name for a file", name=error.name) from None
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} is no file of Python")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def own_module(name: str) -> Any:
    """A module by its name; of those in the working folder, where none that is installed has it.

    Raises ModuleNotFoundError where neither is there, and what the module raises.
    """
    first = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != first:
            raise
    here = str(Path.cwd())
    if not _is_in(Path.cwd(), first):
        raise ModuleNotFoundError(f"no module {first!r} is installed, or lies in {here}", name=first)
    # Behind what is installed; Python puts the folder of a command's script there, in place of the working folder.
    if here not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()
    return importlib.import_module(name)


def _is_in(folder: Path, module: str) -> bool:
    return bool(module) and ((folder / f"{module}.py").is_file() or (folder / module).is_dir())


def _version(found: Any, module: Any) -> str:
    """What a function says that it is, by its attribute ``name``; else the content of the file that it is from."""
    told = getattr(found, "name", None)
    if isinstance(told, str) and told:
        return told
    file = Path(getattr(module, "__file__", None) or "")
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12] if file.is_file() else ""
