"""Predictors of routes, by name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anabranch.errors import ConfigError, DataError
from anabranch.serving.expertflow.predictors.base import Fingerprint, RoutePredictor
from anabranch.serving.expertflow.predictors.encdec import EncoderDecoder
from anabranch.serving.expertflow.predictors.files import read, refused
from anabranch.serving.expertflow.predictors.plain import Frequency, Oracle, RouterLookahead, Slp, Tlp

PREDICTORS: dict[str, type[RoutePredictor]] = {
    kind.kind: kind for kind in (EncoderDecoder, Tlp, Slp, Frequency, RouterLookahead, Oracle)
}


def find_predictor(name: str, fingerprint: Fingerprint, layers: Sequence[Any]) -> RoutePredictor:
    """A predictor that needs no fitting by name, or a fitted one from a file.

    Raises ConfigError for a name of one that has to be fitted, or of none; DataError if a file holds no predictor; CheckpointError for
    one that was made for another model.
    """
    if name in ("tlp", "slp"):
        return PREDICTORS[name](fingerprint)  # type: ignore[call-arg]
    if name == RouterLookahead.kind:
        return RouterLookahead(fingerprint, layers)
    if Path(name).is_file():
        made = load_predictor(name)
        made.fingerprint.check(fingerprint, name)
        return made
    if name in PREDICTORS:
        raise ConfigError(
            f"predictor {name!r} has to be fitted first (anabranch experts fit-predictor); give the fitted one or its file"
        )
    raise ConfigError(f"no predictor {name!r} and no such file; known: {', '.join(PREDICTORS)}")


def load_predictor(path: str | Path) -> RoutePredictor:
    """A fitted predictor from its file. Raises DataError if it holds none."""
    kind, fingerprint, state = read(path)
    restore = getattr(PREDICTORS.get(kind), "restore", None)
    if restore is None:
        known = ", ".join(name for name, each in PREDICTORS.items() if hasattr(each, "restore"))
        raise refused(path, f"kind is {kind[:40]!r}, and those that are fitted are {known}")
    try:
        made: RoutePredictor = restore(fingerprint, state)
    except DataError as error:
        raise refused(path, error) from None
    return made


__all__ = [
    "PREDICTORS",
    "EncoderDecoder",
    "Fingerprint",
    "Frequency",
    "Oracle",
    "RoutePredictor",
    "RouterLookahead",
    "Slp",
    "Tlp",
    "find_predictor",
    "load_predictor",
]
