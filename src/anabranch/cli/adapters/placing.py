"""What commands name as ADAPTER, put onto a model: a folder of peft's, one of our own, or a pool of several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.errors import DataError
from anabranch.files import check_apart

if TYPE_CHECKING:
    from anabranch.adapters.adapt.rows import Row
    from anabranch.adapters.glider import GliderPool
    from anabranch.data import Tokenizer
    from anabranch.lm import Decoder

# Rows of a pass.
_BATCH = 8


def put_adapter(base: Decoder, tokenizer: Tokenizer | None, adapter: str) -> GliderPool | None:
    """What is at ``adapter`` onto the base, which embeds texts where a pool wants it; the pool, where it is one."""
    from anabranch.adapters import load_peft
    from anabranch.adapters.glider import HiddenStates
    from anabranch.adapters.own_folder import read_own
    from anabranch.serving.engine.adapter_place import folder_of
    from anabranch.serving.engine.layer_reader import pool_of

    found = folder_of(adapter, None)
    if found.experts:
        pool = pool_of(found, states=None if tokenizer is None else HiddenStates(base, tokenizer))
        pool.onto(base)
        return pool
    if found.kind is not None:
        raise DataError(
            f"{found.path} has no folders of adapters, so there is nothing that {found.kind} could choose from"
        )
    (read_own if found.is_own else load_peft)(found.path, base)
    return None


def check_adapter_apart(outputs: Sequence[Path], model: str, adapter: str | None, *others: str) -> Path | None:
    """Where the adapter lies; raises where what is written would replace what is read."""
    from anabranch.lm.folder import files_of
    from anabranch.serving.engine.adapter_place import folder_of

    read: list[Any] = [*(files_of(model) if Path(model).is_dir() else [model]), *others]
    found = None if adapter is None else folder_of(adapter, None)
    for place in () if found is None else found.places:
        if place.is_dir():
            read += [path for path in place.iterdir() if path.is_file()]
    check_apart(list(outputs), read)
    return None if found is None else found.path


def check_no_adapter(out: str) -> None:
    """Raise DataError where there is an adapter already, in whose place another one would come."""
    from anabranch.adapters.own_folder import OWN
    from anabranch.adapters.peft_folder import CONFIG

    held = [name for name in (CONFIG, OWN) if (Path(out) / name).exists()]
    if held:
        raise DataError(f"{out} already holds an adapter ({held[0]}); choose another folder, or remove it first")


def telling_rows(base: Decoder, pool: GliderPool | None) -> Callable[[Sequence[Row]], AbstractContextManager[Any]]:
    """What tells the passes of the model of their rows: what each asks a pool, or its task."""
    from anabranch.adapters.tasks import goes_by_task, on_tasks

    if pool is not None:
        return lambda rows: pool.answering([row.prompt for row in rows])
    if goes_by_task(base):
        return lambda rows: on_tasks(base, [row.task or None for row in rows])
    return lambda rows: nullcontext()


def first_of_each(rows: Sequence[Row], most: int) -> list[Row]:
    """The first rows of each task."""
    seen: dict[str, int] = {}
    kept = []
    for row in rows:
        seen[row.task] = seen.get(row.task, 0) + 1
        if seen[row.task] <= most:
            kept.append(row)
    return kept


def passes_of(
    base: Decoder,
    tokenizer: Tokenizer,
    rows: list[Row],
    tasks: list[str],
    pool: GliderPool | None,
    max_tokens: int,
    template: str,
) -> Iterator[Any]:
    """Rows as passes, written as they are learned; while one is looked at, its rows ask a pool what they say."""
    import torch

    from anabranch.adapters.adapt.rows import encoded

    numbers = [tasks.index(row.task or "(none)") for row in rows]
    found = encoded(rows, numbers, tokenizer, template, min(max_tokens, base.config.max_positions))
    each = found.passes(torch.arange(len(rows)), _BATCH, base.embedding.weight.device)
    for start, made in zip(range(0, len(rows), _BATCH), each, strict=True):
        with nullcontext() if pool is None else pool.answering([row.prompt for row in rows[start : start + _BATCH]]):
            yield made


def template_of(said: str | None, adapter: str | None) -> str:
    """What is written around prompts: what a user said (``\\n`` is a new line), what the adapter learned (of a pool: all of them), or what
    `adapt` takes."""
    from anabranch.adapters.adapt.prompts import DEFAULT, check_template, common_template
    from anabranch.serving.engine.adapter_place import folder_of

    if said is not None:
        check_template(said, "--template")
        return said.replace("\\n", "\n")
    return (None if adapter is None else common_template(folder_of(adapter, None).places)) or DEFAULT


def note_of(adapters: Sequence[str]) -> str | None:
    """How the prompts of several adapters were written, where all note the same. What is wrong with their notes is told."""
    from anabranch.adapters.adapt.prompts import common_template

    return common_template(adapters)


@contextmanager
def noted(out: str, template: str | None) -> Iterator[Path]:
    """Where an adapter that is made of others is written, which goes to ``out`` with its note in one on a clean exit."""
    from anabranch.adapters.adapt.prompts import write_template
    from anabranch.adapters.folder_files import staged_adapter

    with staged_adapter(out) as place:
        yield place
        if template is not None:
            write_template(place, template)
