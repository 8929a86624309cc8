"""The plan of ``--memory``, for people."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from anabranch.cli.output import fact, print_json

if TYPE_CHECKING:
    from anabranch.serving.memory import MemoryPlan

# Exit code of a model that does not fit.
NO_FIT = 1


def show(model: str, memory: str, dtype: str | None, as_json: bool) -> int:
    """Plan a model, a preset or a folder with a config.json alone, and print that; the exit code.

    ``dtype`` is of the weights, or bits that they shall have; None leaves it to the plan.
    """
    from anabranch import presets
    from anabranch.serving.config import ServingConfig
    from anabranch.serving.memory import plan_memory

    is_preset = not Path(model).exists() and model in presets.names()
    shape = presets.find(model)("tiny").model if is_preset else None
    bits = {} if dtype is None else {"quantize" if dtype in ("int8", "int4") else "dtype": dtype}
    config = ServingConfig(model=model, memory=memory, **bits)  # type: ignore[arg-type]
    made = plan_memory(config, shape=shape)
    if as_json:
        print_json(made.to_dict())
    else:
        print_plan(made)
    return 0 if made.fits else NO_FIT


def print_plan(plan: MemoryPlan, *, to: TextIO | None = None) -> None:
    """What goes where, and how large it is."""
    out = to or sys.stdout
    config = plan.config
    how = "as stored or in the type of the model" if config.quantize == "none" else f"in {config.quantize}"
    fact("plan", f"{config.model}   in {_size(plan.memory)}: weights {how}{_where(plan)}", to=out)
    rows = [("weights", plan.rest, "beside experts" if plan.experts else "all of them")]
    if plan.experts:
        rows.append(("experts", plan.resident, f"{plan.resident / plan.experts:.0%} of {_size(plan.experts)}"))
    rows += [
        ("keys", plan.kv, "and values of requests"),
        ("work", plan.work, "at most, of a step or of loading"),
        ("program", plan.program, "measured: interpreters and libraries of all processes, tokenizer"),
        (
            "total",
            plan.total,
            "fits" if plan.fits else f"does not fit: give at least {_size(plan.least)} ({plan.least} bytes)",
        ),
    ]
    for label, num_bytes, note in rows:
        fact(label, f"  {_size(num_bytes):>10}   {note}", to=out)
    if plan.disk:
        fact("disk", f"  {_size(plan.disk):>10}   of the cache folder, for experts rounded at the start", to=out)


def _where(plan: MemoryPlan) -> str:
    if not plan.experts:
        return ", all in memory"
    return ", all in memory" if plan.config.expert_budget is None else ", experts on disk"


def _size(num_bytes: int) -> str:
    """Bytes in the units that memory is given in."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
