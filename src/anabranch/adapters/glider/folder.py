"""What a contributor adds to a folder of peft's: ``glider.json`` (instructions) and ``glider.safetensors`` (a gate for each layer).

describe_expert("my-lora", instruction="Write SQL that answers a question about a table.")
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from anabranch.adapters.base_name import how_vague, is_one_base
from anabranch.adapters.folder_files import CARD, GATES
from anabranch.adapters.glider.vectors import check_gates
from anabranch.adapters.peft_place import CONFIG, check_there
from anabranch.bounds import shown
from anabranch.errors import CheckpointError, ConfigError
from anabranch.files import atomic_write, atomic_write_json, read_json
from anabranch.lm.shards import write_file
from anabranch.lm.tensors import FLOATS, SafetensorsFiles

__all__ = ["Described", "describe_expert", "expert_folders", "read_described", "read_instructions", "texts_of"]

log = logging.getLogger(__name__)

# Of the trainer of transformers.
_STEP = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True, eq=False)
class Described:
    """What a folder says of its adapter.

    Attributes:
        instructions: the first is the adapter's; others are other wordings of it.
        gates: by the names of transformers' modules; None where there are none.
    """

    instructions: tuple[str, ...] = ()
    gates: Mapping[str, Tensor] | None = field(default=None)


def texts_of(instruction: str | Sequence[str] | None, what: str) -> tuple[str, ...]:
    """One wording or several. Raises ConfigError for what is no text, or an empty one."""
    texts = () if instruction is None else (instruction,) if isinstance(instruction, str) else tuple(instruction)
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"the instruction of {what} is {shown(text)}; it must be a text, or several wordings")
    return texts


def describe_expert(
    folder: str | Path,
    *,
    instruction: str | Sequence[str] | None = None,
    gate: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an instruction (or several wordings), gates, or both beside the adapter in ``folder``; what is not told stays.

    Raises ConfigError for gates that do not fit the adapter and instructions that are no texts, CheckpointError where there is no adapter,
    or what is there is damaged.
    """
    place = Path(folder)
    check_there(place)
    texts = texts_of(instruction, str(folder))
    if gate is not None:
        check_gates(gate, folder)
        tensors = {module: gate_C.detach().contiguous() for module, gate_C in gate.items()}
        atomic_write(place / GATES, lambda temporary: write_file(temporary, tensors))
    if texts:
        # What others keep there stays.
        before = read_json(place / CARD) if (place / CARD).is_file() else {}
        atomic_write_json(place / CARD, {**before, "schema": 1, "instructions": list(texts)})


def read_described(folder: str | Path) -> Described:
    """What `describe_expert` wrote; nothing where it did not.

    Raises CheckpointError for files that are damaged, and gates that do not fit the adapter.
    """
    place = Path(folder)
    texts = read_instructions(folder)
    if not (place / GATES).is_file():
        return Described(texts)
    files = SafetensorsFiles([place / GATES])
    gates = {name: files.read(name) for name in files.names}
    for name, gate_C in gates.items():
        if gate_C.dtype not in FLOATS or gate_C.dim() != 1 or not bool(gate_C.isfinite().all()):
            raise CheckpointError(f"{place / GATES}: {name} is no row of finite numbers")
    try:
        check_gates(gates, folder)
    except ConfigError as error:
        raise CheckpointError(f"{place / GATES}: {error}") from None
    return Described(texts, gates)


def read_instructions(folder: str | Path) -> tuple[str, ...]:
    """The instructions alone, whatever gates there are. Raises CheckpointError for a file that is damaged."""
    card = Path(folder) / CARD
    if not card.is_file():
        return ()
    told = read_json(card).get("instructions", [])
    if not isinstance(told, list | str):
        raise CheckpointError(f"{card}: instructions is {shown(told)}; it must be a list of texts")
    try:
        return texts_of(told, str(card))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def check_bases(bases: Mapping[str, object]) -> None:
    """Raise ConfigError where experts were trained on several models that are here; a warning where names alone cannot tell that."""
    told = [(name, base) for name, base in bases.items() if isinstance(base, str) and base]
    # All are compared with one of which most can be told.
    told.sort(key=lambda one: how_vague(one[1]))
    unsure = []
    for name, base in told[1:]:
        # One model may lie in several places.
        is_one = is_one_base([told[0][1], base])
        said = f"expert {name!r} was trained on {shown(base)}, and {told[0][0]!r} on {shown(told[0][1])}"
        if is_one is False:
            raise ConfigError(f"{said}; a pool is of one base model")
        if is_one is None:
            unsure.append(said)
    if unsure:
        more = f" ({len(unsure) - 1} more like it)" if len(unsure) > 1 else ""
        log.warning("%s%s; whether these are one model cannot be told here, and a pool is of one", unsure[0], more)


def expert_folders(folder: str | Path) -> dict[str, Path]:
    """The folders of adapters in ``folder``, by name, sorted. Raises CheckpointError where there are none.

    Of several adapters peft writes one, ``default``, into the folder itself, and the others below.
    """
    place = Path(folder)
    if not place.is_dir():
        raise CheckpointError(f"no pool at {place}: it must be a folder whose folders are adapters of peft's")
    found = {path.name: path for path in sorted(place.iterdir()) if (path / CONFIG).is_file()}
    if (place / CONFIG).is_file():
        # A trainer leaves earlier steps of the same adapter below it.
        found = {name: path for name, path in found.items() if not _STEP.fullmatch(name)}
        if not found:
            raise CheckpointError(
                f"{place} is one adapter ({CONFIG}), and a pool is a folder of such folders; give the one above it"
            )
        if "default" in found:
            raise CheckpointError(
                f"{place} has an adapter itself ({CONFIG}), which peft calls default, and another in its folder default; give that folder "
                "another name"
            )
        found = {"default": place, **found}
    if not found:
        raise CheckpointError(f"{place} has no folder with {CONFIG}; a pool is a folder of adapters of peft's")
    return found
