"""adapter_config.json of the kinds of peft that are no LoRA: IA3, Poly, and virtual tokens in front (prompt and prefix tuning)."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

from anabranch.adapters.patterns import matching
from anabranch.adapters.peft_config import LoraTable, PeftTable, TargetTable
from anabranch.adapters.peft_file import AdapterFile
from anabranch.adapters.peft_kinds import BY_PEFT, NOT_BY_ROWS, ByPeftTable
from anabranch.adapters.peft_place import CONFIG, check_there
from anabranch.bounds import shown
from anabranch.errors import CheckpointError
from anabranch.files import read_json

__all__ = [
    "Ia3Table",
    "PTuningTable",
    "PolyTable",
    "PrefixTable",
    "PromptTable",
    "VirtualTable",
    "described_by_peft",
    "is_by_peft",
    "table_in",
    "table_of",
]


class Ia3Table(TargetTable):
    """The config of IA3."""

    peft_type: ClassVar[str] = "IA3"

    def _check(self) -> None:
        if not isinstance(self.table.get("feedforward_modules"), str):
            self._words("feedforward_modules")
        super()._check()

    def of_inputs(self, modules: Collection[str]) -> set[str]:
        """Those of ``modules`` whose inputs are multiplied: a name that ends so, be it within a word, as peft has it."""
        given = self.table.get("feedforward_modules")
        if isinstance(given, str):
            what = f"feedforward_modules in {self.path}"
            return matching([given], modules, is_ending=False, what=what)[0]
        words = tuple(self._words("feedforward_modules"))
        return {name for name in modules if name.endswith(words)}


class PolyTable(TargetTable):
    """The config of Poly, and of multi-head routing (``n_splits`` above 1)."""

    peft_type: ClassVar[str] = "POLY"

    def _check(self) -> None:
        if self.table.get("poly_type", "poly") != "poly":
            self._refuse("poly_type", self.table["poly_type"], "'poly' is what can be computed here")
        for name, usual in (("r", 8), ("n_tasks", 1), ("n_skills", 4), ("n_splits", 1)):
            self._size(name, usual)
        super()._check()

    @property
    def rank(self) -> int:
        """Of each skill."""
        return self._size("r", 8)

    @property
    def num_tasks(self) -> int:
        """Tasks that mix skills."""
        return self._size("n_tasks", 1)

    @property
    def num_skills(self) -> int:
        """Skills of each layer."""
        return self._size("n_skills", 4)

    @property
    def num_splits(self) -> int:
        """Pieces of inputs and outputs that have weights of their own."""
        return self._size("n_splits", 1)


class VirtualTable(PeftTable):
    """The config of virtual tokens in front of every sequence; ``what`` it is called."""

    what: ClassVar[str]

    def _check(self) -> None:
        self._size("num_virtual_tokens")
        for name in ("token_dim", "num_layers", "num_attention_heads"):
            if self.table.get(name) is not None:
                self._size(name)
        if self.table.get("num_transformer_submodules") not in (None, 1):
            self._refuse(
                "num_transformer_submodules",
                self.table["num_transformer_submodules"],
                "it must be 1: models here have no encoder beside the decoder",
            )
        if not isinstance(self.table.get("prefix_projection"), bool | None):
            self._refuse("prefix_projection", self.table["prefix_projection"], "it must be true or false")

    @property
    def num_tokens(self) -> int:
        """Virtual tokens."""
        return self._size("num_virtual_tokens")

    def said(self, name: str) -> int | None:
        """A size that may be left out."""
        return None if self.table.get(name) is None else self._size(name)

    @property
    def is_projected(self) -> bool:
        """Whether a network made the tokens while they were trained, which is not in the file."""
        return bool(self.table.get("prefix_projection"))


class PromptTable(VirtualTable):
    """The config of prompt tuning: embeddings."""

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    what: ClassVar[str] = "prompt tuning"


class PTuningTable(PromptTable):
    """The config of P-tuning: embeddings that a network made while they were trained."""

    peft_type: ClassVar[str] = "P_TUNING"
    what: ClassVar[str] = "P-tuning"

    @property
    def is_projected(self) -> bool:
        """Always."""
        return True


class PrefixTable(VirtualTable):
    """The config of prefix tuning: keys and values of each layer."""

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    what: ClassVar[str] = "prefix tuning"


_KINDS: dict[str, type[PeftTable]] = {
    kind.peft_type: kind for kind in (LoraTable, Ia3Table, PolyTable, PromptTable, PTuningTable, PrefixTable)
}


def table_of(table: Mapping[str, Any], path: Path) -> Any:
    """The config of whatever kind it says that it is. Raises CheckpointError for a kind that cannot be read, or fields that cannot be."""
    kind = table.get("peft_type")
    if isinstance(kind, str) and kind in BY_PEFT:
        return ByPeftTable(table, path)
    if isinstance(kind, str) and kind in NOT_BY_ROWS:
        raise CheckpointError(f"peft_type in {path} is {kind!r}, which {NOT_BY_ROWS[kind]}")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise CheckpointError(f"peft_type in {path} is {shown(kind)}; {', '.join([*_KINDS, *BY_PEFT])} can be read")
    return _KINDS[kind](table, path)


def table_in(folder: Path) -> Any:
    """`table_of` the adapter_config.json in ``folder``. Raises CheckpointError also where there is none."""
    check_there(folder)
    return table_of(read_json(folder / CONFIG), folder / CONFIG)


def is_by_peft(folder: str | Path) -> bool:
    """Whether ``folder`` holds an adapter of a kind that peft alone computes. Raises as `table_in`."""
    return isinstance(table_in(Path(folder)), ByPeftTable)


def described_by_peft(folder: str | Path) -> dict[str, Any]:
    """What such an adapter is, by its files alone: ``kind``, ``base``, ``targets`` (as its config names them), ``parameters`` and
    ``size_bytes``.

    All numbers are read. Raises CheckpointError where they are damaged.
    """
    place = Path(folder)
    table, file = table_in(place), AdapterFile(place)
    named = table.target_modules
    return {
        "kind": table.kind.name,
        "base": table.table.get("base_model_name_or_path"),
        "targets": [named] if isinstance(named, str) else sorted(named or ()),
        "parameters": sum(file.read(name).numel() for name in file.names),
        "size_bytes": (place / CONFIG).stat().st_size + file.path.stat().st_size,
    }
