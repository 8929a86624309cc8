"""`Method`: one way to adapt a frozen model. Training, checkpoints, reports and the command line know no method by name.

    class Mine(Method, kind="mine"):
        def layer(self, tasks): return MyLayer.Config(rank=self.config.rank)

A method says which layer stands beside the matrices that are adapted; the rest has defaults. It gets a name by a line in
`anabranch.registry`, or by an entry point in the group ``anabranch.adapter_method``.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from anabranch.adapters.adapt.answers import Rows
from anabranch.adapters.adapt.lesson import Lesson
from anabranch.adapters.own_folder import NUMBERS, OWN, write_own
from anabranch.adapters.peft_file import PICKLE
from anabranch.adapters.peft_folder import CONFIG, WEIGHTS, Adapter, write_peft
from anabranch.adapters.put_on import added_names, put_on
from anabranch.adapters.saving import adapter_on
from anabranch.adapters.tasks import told_tasks
from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, configclass
from anabranch.errors import CheckpointError
from anabranch.files import read_json
from anabranch.lm.decoder import Decoder
from anabranch.nn import Linear
from anabranch.train.optimizer import Speed

__all__ = ["ADAPTER", "Method", "Written", "patterns_of_targets", "set_anew", "values_of", "write_peft_or_own"]

# The adapter in the folder of its run.
ADAPTER = "adapter"

# What of a folder decides what an adapter is.
_SETTINGS, _NUMBERS = (CONFIG, OWN), (WEIGHTS, NUMBERS, PICKLE)

# For --target: what is meant by one word.
_ALL = "blocks.*"


@dataclass(frozen=True)
class Written:
    """What a finished adaptation wrote.

    Attributes:
        folder: where.
        form: ``peft``, a folder that peft and `anabranch eval --adapter` read; ``anabranch``, one of our own; or ``model``, a whole model.
        note: what there is to say of it; empty for nothing.
    """

    folder: Path
    form: str
    note: str = ""


class Method(Part, family="adapter_method"):
    """How a frozen model is adapted.

    Attributes:
        summary: what it is, in a few words.
        folders: fields of its config that name folders, one or several.
    """

    summary: ClassVar[str] = ""
    folders: ClassVar[tuple[str, ...]] = ()

    @configclass
    class Config(BaseConfig):
        """Attributes: ``targets``, which linear layers: patterns of their names, words such as ``q`` and ``down``, or ``all``."""

        targets: tuple[str, ...] = Field(default=("*.attention.*",), min_length=1)

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def name(self) -> str:
        """What commands call it."""
        return str(self.kind)

    @property
    def needs_task(self) -> bool:
        """Whether it routes by task, so that each row must name one. Default: no."""
        return False

    @property
    def trains_base(self) -> bool:
        """Whether what learns are parameters of the base, so that what comes out is a model and no adapter."""
        return False

    @property
    def parts_differ(self) -> str:
        """Why a batch in parts (of processes, by ``train.accumulation``) teaches something else than at once; empty where it does not."""
        return ""

    def layer(self, tasks: Sequence[str]) -> Linear.Config:
        """What stands beside each target; ``tasks`` are the names of the rows' tasks, sorted."""
        raise NotImplementedError  # abstract

    def linears(self, tasks: Sequence[str]) -> dict[str, Linear.Config]:
        """The layers by patterns of names."""
        made = self.layer(tasks)
        return dict.fromkeys(patterns_of_targets(self.config.targets), made)

    def begin(self, model: Decoder, tasks: Sequence[str], *, seed: int) -> Decoder:
        """Put the layers on, in place: what learns has ``requires_grad``, all else has not."""
        return put_on(model, self.linears(tasks), seed=seed)

    def go_on(self, model: Decoder, tasks: Sequence[str], layers: Mapping[str, Linear.Config], *, seed: int) -> Decoder:
        """The same for a run that goes on: ``layers`` are those it had, by pattern, and their numbers are put in afterwards.

        A method that began from folders needs them no more where its numbers are all there is of them. Default: `begin`.
        """
        return self.begin(model, tasks, seed=seed)

    def began_from(self) -> dict[str, str]:
        """What of `folders` `go_on` reads again, by content: a run goes on from the same alone. Default: all, where `go_on` is `begin`."""
        if type(self).go_on is not Method.go_on:
            return {}
        return {name: digest_of_folders(told) for name, told in self._folders().items()}

    def begins_from(self) -> list[str]:
        """The folders of adapters that a new run begins from, of all `folders`."""
        return [folder for told in self._folders().values() for folder in told]

    def _folders(self) -> dict[str, list[str]]:
        named = {name: getattr(self.config, name) for name in self.folders}
        return {
            name: [told] if isinstance(told, str) else list(told) for name, told in named.items() if told is not None
        }

    def look(self, model: Decoder, losses: Iterable[Tensor]) -> None:
        """Before the first step of a new run: -log p(answer) of each of its first rows, made while this goes over them. Default: none."""

    def kept(self, model: Decoder) -> list[str]:
        """Names in the model's state of what checkpoints hold: all that is not the base's as it was read, be it a buffer."""
        return added_names(model)

    @property
    def needs_labels(self) -> bool:
        """Whether each row that is learned must name its task. Default: where the method routes by it."""
        return self.needs_task

    def state(self, task_B: Tensor, length: int, fraction: float | None) -> dict[str, Any]:
        """What layers are told of the rows of a pass, by name. Default: the task of each, where the method routes by it.

        Args:
            task_B: the numbers of their tasks; -1 for one that is not learned.
            length: L of the pass.
            fraction: how far the training is; None where a pass is not for learning.
        """
        return told_tasks(task_B, length) if self.needs_task else {}

    def loss_counts(self, task_R: Tensor) -> dict[str, float]:
        """What losses that layers add are means of, where not of tokens, by the names of these losses. Default: all are of tokens.

        ``task_R``: the numbers of the tasks of a pass's rows, as of `state`.
        """
        return {}

    def before_step(self, model: Decoder, step: int, fraction: float) -> None:
        """Do what a stage of the training wants, see `StepHooks`. Default: nothing."""

    def speed(self, name: str, parameter: nn.Parameter) -> Speed | None:
        """How quickly a parameter learns, see `Task.speed`; None as all others."""
        return None

    def routing(self, model: Decoder, rows: Iterable[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Any]:
        """What the trained routers have come to, for the report, JSON-ready. Default: nothing.

        ``rows``: passes (token_BL, mask_BL, task_B) over rows that are held out, made while a method goes over them; the numbers of tasks
        as of `state`.
        """
        return {}

    def lessons(self, batch: Rows) -> Sequence[Lesson]:
        """What a step learns besides the answers of ``batch``: rows that it has in the pass besides, and losses. Default: nothing."""
        return ()

    def write(self, folder: Path, model: Decoder, base: str) -> Written:
        """Write the adapter as others use it. Default: a folder of our own, which `read_own` puts onto a model.

        Args:
            folder: not there or empty; whoever calls this puts what is made in the place of an earlier adapter, see `AdaptTask.write`.
            model: the adapted one.
            base: the model that was adapted, for the record.
        """
        write_own(folder, model, base=base)
        return Written(folder, "anabranch")


def set_anew(config: BaseConfig) -> dict[str, Any]:
    """The fields that are not as they come, by name; of a config that can be made without any."""
    usual = type(config)()
    values = {field.name: getattr(config, field.name) for field in fields(config)}  # type: ignore[arg-type]
    return {name: value for name, value in values.items() if value != getattr(usual, name)}


def values_of(config: BaseConfig, kind: type[BaseConfig]) -> dict[str, Any]:
    """What ``config`` says of the fields of ``kind``, from which it has them, by name."""
    return {field.name: getattr(config, field.name) for field in fields(kind)}  # type: ignore[arg-type]


def write_peft_or_own(
    folder: Path, model: Decoder, base: str, adapter_of: Callable[[Decoder], Adapter] = adapter_on
) -> Written:
    """A folder of peft's with what ``adapter_of`` makes of the model; one of our own for a model that no family of Hugging Face's has."""
    try:
        adapter = adapter_of(model)
    except CheckpointError as error:
        write_own(folder, model, base=base)
        return Written(folder, "anabranch", f"peft has no names for the layers of this model: {error}")
    write_peft(folder, adapter.of_base(base))
    return Written(folder, "peft")


def digest_of_folders(folders: Sequence[str]) -> str:
    """Of adapters by content, in their order: of their settings, however they are written, and numbers, and of nothing else there."""
    hashed = hashlib.sha256()
    for folder in map(Path, folders):
        for name in _SETTINGS:
            if (folder / name).is_file():
                hashed.update(f"{name} {json.dumps(read_json(folder / name), sort_keys=True)}\n".encode())
        # Numbers are read from the first of these that is there.
        path = next((folder / name for name in _NUMBERS if (folder / name).is_file()), None)
        hashed.update(b"\n" if path is None else path.read_bytes())
    return hashed.hexdigest()[:16]


def patterns_of_targets(targets: Sequence[str]) -> list[str]:
    """Patterns of names of linear layers: ``q`` is the last word of a name, ``all`` every layer of the blocks."""
    found = [_ALL if word == "all" else word if set(word) & set(".*?[") else f"*.{word}" for word in targets]
    return list(dict.fromkeys(found))
