"""`adapter_folder`: writing an adapter where another of its form may lie, so that nothing of a user's is lost.

    adapter_config.json, adapter_model.safetensors      settings and numbers of peft's form: replaced
    adapter.json, adapter.safetensors                   those of our own: replaced
    prompt.json                                         how prompts were written while it learned: goes with the numbers
    README.md, glider.json                              what people say of it: stay as they are
    glider.safetensors                                  gates, which are of these numbers alone: stay where settings and numbers are the
                                                        same, else they go on as glider.safetensors.old, and a warning says so

A folder that holds anything else is not written at all.
"""

import filecmp
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from anabranch.adapters.base_name import BASE
from anabranch.adapters.peft_file import WEIGHTS
from anabranch.adapters.peft_place import CONFIG
from anabranch.errors import AnabranchError, DataError
from anabranch.files import atomic_folder, check_holds_only, check_no_file, check_not_here, read_json
from anabranch.lm.tensors import SafetensorsFiles

__all__ = [
    "CARD",
    "FORMS",
    "GATES",
    "NUMBERS",
    "OWN",
    "OWN_FORM",
    "PEFT_FORM",
    "PROMPT_FILE",
    "adapter_folder",
    "check_writable",
    "staged_adapter",
]

log = logging.getLogger(__name__)

OWN, NUMBERS = "adapter.json", "adapter.safetensors"
CARD, GATES, PROMPT_FILE = "glider.json", "glider.safetensors", "prompt.json"
# Settings, which mark a folder as one of this form, and numbers.
PEFT_FORM, OWN_FORM = (CONFIG, WEIGHTS), (OWN, NUMBERS)
FORMS = (PEFT_FORM, OWN_FORM)
_OLD_GATES = f"{GATES}.old"
_SAID = ("README.md", CARD)
_STAGE = "stage"


@contextmanager
def adapter_folder(folder: str | Path, forms: Sequence[tuple[str, str]] = FORMS) -> Iterator[Path]:
    """Fill the yielded folder with an adapter; on a clean exit it takes the place of ``folder``, with what of that stays.

    Whenever a process is killed, either the old folder is there or the new one, whole. What people said of the old adapter goes before
    what the new one was filled with; gates that the new one was filled with replace those of the old.

    Args:
        folder: not there, empty, or with an adapter of one of these ``forms`` and what may lie beside it, see above.
        forms: settings and numbers of each, by their files. Default: peft's and our own.

    Raises as `atomic_folder`: DataError where the folder holds anything else, changes meanwhile or cannot be written, CapacityError where
    the disk is full. What else goes wrong inside names ``folder``, not the one that is filled.
    """
    place = Path(folder)

    def check_old(old: Path) -> None:
        # The new one lies in the place by now.
        there = [name for name in _SAID if os.path.lexists(old / name)]
        changed = next((name for name in there if not _is_equal(old / name, place / name)), None)
        if changed is not None:
            raise DataError(f"{place / changed} has changed while an adapter was written beside it; try again")

    with atomic_folder(place, replacing=_replaced(place, forms), check_old=check_old) as made:
        with _told_as(place, made):
            yield made
        for name in _SAID:
            if os.path.lexists(place / name):
                _copy(place / name, made / name)
        _keep_gates(place, made)


@contextmanager
def staged_adapter(folder: str | Path) -> Iterator[Path]:
    """The same for who writes an adapter in several steps, each of them atomic: a folder that is not there yet is yielded."""
    with adapter_folder(folder) as made, _told_as(Path(folder), made / _STAGE):
        yield made / _STAGE
        for path in (made / _STAGE).iterdir():
            path.rename(made / path.name)
        (made / _STAGE).rmdir()


@contextmanager
def _told_as(place: Path, made: Path) -> Iterator[None]:
    """Errors name the place, and not the folder that is to take it."""
    try:
        yield
    except AnabranchError as error:
        error.args = (str(error).replace(str(made), str(place)),)
        raise


def check_writable(folder: str | Path, forms: Sequence[tuple[str, str]] = FORMS) -> None:
    """Before the work: raise DataError where `adapter_folder` would, for what lies there."""
    place, advice = Path(folder).resolve(), "move it elsewhere"
    check_no_file(folder, advice=advice)
    check_not_here(place)
    check_holds_only(place, _replaced(place, forms), name=Path(folder), advice=advice)


def _replaced(place: Path, forms: Sequence[tuple[str, str]]) -> str:
    """A pattern of the names that a folder may hold. A README.md without an adapter beside it is somebody's page, and of no adapter."""
    there = [name for form in forms if (place / form[0]).exists() for name in form]
    beside = [*_SAID, PROMPT_FILE, GATES, _OLD_GATES]
    return "|".join(map(re.escape, [*there, *beside])) if there else ""


def _keep_gates(place: Path, made: Path) -> None:
    """Gates stay beside the numbers that they were trained beside, and are set aside where those are others."""
    for name in (_OLD_GATES, GATES):
        if not (place / name).is_file() or (made / name).exists():
            continue
        if name == GATES and not _is_same_adapter(place, made):
            log.warning(
                "the gates in %s were trained beside other numbers than the adapter has now; they are in %s, which nobody reads; train "
                "new ones with anabranch adapt --method gate",
                place,
                _OLD_GATES,
            )
            _copy(place / name, made / _OLD_GATES)
        else:
            _copy(place / name, made / name)


def _is_same_adapter(first: Path, second: Path) -> bool:
    """Whether two folders have the same settings, but for the base's name, and the same numbers. Damaged ones are no others' equals."""
    try:
        form = next(form for form in FORMS if (first / form[0]).is_file() and (second / form[0]).is_file())
        tables = [{**read_json(place / form[0]), BASE: None} for place in (first, second)]
        files = [SafetensorsFiles([place / form[1]]) for place in (first, second)]
        return (
            tables[0] == tables[1]
            and sorted(files[0].names) == sorted(files[1].names)
            and all(torch.equal(files[0].read(name), files[1].read(name)) for name in files[0].names)
        )
    except (AnabranchError, StopIteration):
        return False


def _copy(source: Path, target: Path) -> None:
    """A file, a link or a folder, in place of what is there."""
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True)
        return
    target.unlink(missing_ok=True)
    shutil.copy2(source, target, follow_symlinks=False)


def _is_equal(first: Path, second: Path) -> bool:
    """Whether a file, or a link, is as it was when it was copied; of folders, that they are there."""
    if first.is_symlink() or second.is_symlink():
        return first.is_symlink() and second.is_symlink() and os.readlink(first) == os.readlink(second)
    if first.is_dir():
        return second.is_dir()
    return first.is_file() and second.is_file() and filecmp.cmp(first, second, shallow=False)
