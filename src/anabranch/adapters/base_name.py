"""What an adapter's config calls the base that it was trained on, which is information: it may lie elsewhere on another machine."""

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from anabranch.bounds import shown
from anabranch.errors import AnabranchError

__all__ = ["BASE", "how_vague", "is_one_base", "warn_of_base"]

BASE = "base_model_name_or_path"

log = logging.getLogger(__name__)

# Parts of words that a path to any model may end with: they say nothing of which it is.
_GENERIC = re.compile(
    r"((models?|base|checkpoints?|ckpt|weights|snapshots?|out|output|merged|final|best|last|latest|main|new|old|trained|finetuned|step|"
    r"epoch|run|v|fp|bf|f|int|nf|q)?\d*)|\d+[bmk]|hf|pt|gguf|gptq|awq|safetensors|pytorch|instruct|chat|[0-9a-f]{32,64}"
)
# What those who pack a model in few bits add to its name.
_PACKED = re.compile(r"([-_.](i?q\d\w*|b?f16|f32))?\.gguf|(-unsloth)?-bnb-[48]bit")


def is_one_base(names: Iterable[object]) -> bool | None:
    """Whether all of ``names``, names and paths, are of one base; None where that cannot be told. Those that are no text say nothing.

    True for names whose last words are the same and tell a model. False alone for folders of models here whose vectors of tokens differ,
    which few trainings leave as they are: one model has many names, as others pack, convert and copy it.
    """
    told = sorted(dict.fromkeys(name for name in names if isinstance(name, str) and name), key=how_vague)
    found = [_are_one(told[0], name) for name in told[1:]]
    return False if False in found else None if None in found else True


def how_vague(name: str) -> tuple[bool, bool]:
    """A key that sorts names by how much can be told of them: folders of models here first, then those whose words tell a model."""
    return not (_is_folder(name) and (Path(name) / "config.json").is_file()), _word_of(name) is None


def warn_of_base(what: str, told: object, base: str) -> None:
    """Ask in one line whether ``what`` is of another base than ``base``, the model that it is put onto: by content, or else by words."""
    if not isinstance(told, str) or not told:
        return
    is_alike = _are_alike_here(told, base)
    if is_alike is False or (
        is_alike is None and _have_one_word(told, base) is False and not _is_one_place(told, base)
    ):
        log.warning("%s names the base %s, and the model is %s; is it another one?", what, shown(told), shown(base))


def _are_one(first: str, second: str) -> bool | None:
    if _is_one_place(first, second):
        return True
    if _are_alike_here(first, second) is False:
        return False
    # What was merged into a base leaves its vectors of tokens as they are, so that these alone are no yes.
    return True if _have_one_word(first, second) else None


def _have_one_word(first: str, second: str) -> bool | None:
    """Whether two names tell the same model; None where one tells none."""
    one, other = _word_of(first), _word_of(second)
    return None if one is None or other is None else one == other


def _word_of(name: str) -> str | None:
    """What of a name or path is the same wherever the model lies: its last word, of a cache of the hub's the model's; None for one that
    any model may have."""
    parts = [part for part in re.split(r"[/\\]+", name) if part]
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    word = _PACKED.sub("", (cached or parts or [""])[-1].casefold())
    return None if all(map(_GENERIC.fullmatch, re.split(r"[-_.]", word))) else word


def _is_one_place(first: str, second: str) -> bool:
    return _exists(first) and _exists(second) and os.path.samefile(first, second)


def _is_folder(name: str) -> bool:
    return _exists(name) and Path(name).is_dir()


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


def _are_alike_here(first: str, second: str) -> bool | None:
    """Whether two folders here hold models with the same vectors of tokens; None where one is none, or in a file, which packs them."""
    # They know of folders of peft's, which know of this.
    from anabranch.adapters.base_digest import is_same_base, stored_digest

    if not (_is_folder(first) and _is_folder(second)):
        return None
    try:
        return is_same_base(stored_digest(first, torch.float32), stored_digest(second, torch.float32))
    except (AnabranchError, OSError):
        return None
