"""What an adapter's config calls the base that it was trained on, which is information: it may lie elsewhere on another machine."""

import logging
from collections.abc import Iterable
from pathlib import PurePath

from anabranch.bounds import shown

__all__ = ["BASE", "are_alike", "warn_of_base", "word_of"]

BASE = "base_model_name_or_path"

log = logging.getLogger(__name__)


def word_of(name: str) -> str:
    """What of a name or path is the same wherever the model lies: its last word; of a snapshot in a cache of the hub's, the model's."""
    parts = PurePath(name).parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].rpartition("--")[2]
    return parts[-1] if parts else name


def are_alike(names: Iterable[object]) -> bool:
    """Whether all of ``names`` may be of one base; those that are empty, or no text, say nothing."""
    return len({word_of(name) for name in names if isinstance(name, str) and name}) < 2


def warn_of_base(what: str, told: object, base: str) -> None:
    """Tell in one line that ``what`` names a base that is called otherwise than ``base``, the model that it is put onto."""
    if not are_alike([told, base]):
        log.warning("%s names the base %s, and the model is %s; is it another one?", what, shown(told), shown(base))
