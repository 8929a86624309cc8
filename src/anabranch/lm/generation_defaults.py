"""How a model's makers say that it is sampled from: the ``generation_config.json`` beside it. What a user says goes before it."""

import logging
from pathlib import Path
from typing import Any

from anabranch.errors import AnabranchError
from anabranch.files import read_json
from anabranch.lm.checkpoint import find_model

__all__ = ["generation_defaults"]

logger = logging.getLogger(__name__)

# Of each field the least and the greatest number that samplers take.
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (0, 2**31 - 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
}


def generation_defaults(model: str | Path) -> dict[str, Any]:
    """``temperature``, ``top_p``, ``top_k``, ``min_p`` and ``repetition_penalty``, as far as the model's folder says them.

    ``do_sample: false`` means a temperature of 0. A value that cannot be is left out with a warning; a GGUF file says nothing. The ends
    of a text in the same file are the tokenizer's, see `anabranch.data.load_tokenizer`. Raises CheckpointError if there is no such model.
    """
    found = find_model(model)
    file = found / "generation_config.json"
    if found.is_file() or not file.is_file():
        return {}
    try:
        table = read_json(file)
    except AnabranchError as error:
        logger.warning("%s is left out: %s", file, error)
        return {}
    given: dict[str, Any] = {}
    for name, (least, most) in _RANGES.items():
        value = table.get(name)
        if value is None:
            continue
        is_number = type(value) in (int, float) and least <= value <= most
        if not is_number or (name == "top_k" and value != int(value)) or (name == "top_p" and value == 0):
            logger.warning("%s in %s is %r, which cannot be; it is left out", name, file, value)
            continue
        given[name] = int(value) if name == "top_k" else value
    if table.get("do_sample") is False:
        given["temperature"] = 0.0
    return given
