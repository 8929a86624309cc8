"""What an adapter's config calls the base that it was trained on, which is information: it may lie elsewhere on another machine."""

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from anabranch.bounds import shown
from anabranch.errors import AnabranchError

__all__ = ["BASE", "is_one_base", "says_which", "warn_of_base"]

BASE = "base_model_name_or_path"

log = logging.getLogger(__name__)

# Words that a path to any model may end with: they say nothing of which it is.
_GENERIC = re.compile(
    r"((base|merged|final|best|last|latest|main|trained|finetuned)[-_]?)?(models?|base|checkpoints?|ckpt|weights|snapshots?|out|output)?"
    r"([-_]?(step|epoch|checkpoint))?([-_]?\d+)?|[0-9a-f]{32,64}"
)
# What those who pack a model in few bits add to its name.
_PACKED = re.compile(r"([-_.](i?q\d\w*|b?f16|f32))?\.gguf|(-unsloth)?-bnb-[48]bit")


def is_one_base(names: Iterable[object]) -> bool | None:
    """Whether all of ``names``, names and paths, are of one base; None where that cannot be told. Those that are no text say nothing.

    Of two folders of models that are here the vectors of tokens are compared, which few trainings leave as they are; else names, by their
    last words.
    """
    told = list(dict.fromkeys(name for name in names if isinstance(name, str) and name))
    found = [_are_one(told[0], name) for name in told[1:]]
    return False if False in found else None if None in found else True


def says_which(name: str) -> bool:
    """Whether a name or path has a word by which its model may be known elsewhere."""
    return _word_of(name) is not None


def warn_of_base(what: str, told: object, base: str) -> None:
    """Tell in one line that ``what`` names a base that is another one than ``base``, the model that it is put onto."""
    if is_one_base([told, base]) is False:
        log.warning("%s names the base %s, and the model is %s; is it another one?", what, shown(told), shown(base))


def _are_one(first: str, second: str) -> bool | None:
    if _exists(first) and _exists(second) and os.path.samefile(first, second):
        return True
    one, other = _word_of(first), _word_of(second)
    is_named = None if one is None or other is None else one == other
    is_alike = _are_alike_here(first, second)
    if is_alike is None:
        return is_named
    # What was merged into a base leaves its vectors of tokens as they are.
    return (is_named or None) if is_alike else False


def _word_of(name: str) -> str | None:
    """What of a name or path is the same wherever the model lies: its last word, of a cache of the hub's the model's; None for one that
    any model may have."""
    parts = [part for part in re.split(r"[/\\]+", name) if part]
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    word = _PACKED.sub("", (cached or parts or [""])[-1].casefold())
    return None if word.strip(".") == "" or _GENERIC.fullmatch(word) else word


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


def _are_alike_here(first: str, second: str) -> bool | None:
    """Whether two folders here hold models with the same vectors of tokens; None where one is none, or in a file, which packs them."""
    # They know of folders of peft's, which know of this.
    from anabranch.adapters.base_digest import is_same_base, stored_digest

    if not all(_exists(name) and Path(name).is_dir() for name in (first, second)):
        return None
    try:
        return is_same_base(stored_digest(first, torch.float32), stored_digest(second, torch.float32))
    except (AnabranchError, OSError):
        return None
