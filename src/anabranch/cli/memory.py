"""The plan of ``--memory``, for people."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from anabranch.cli.output import binary_size, fact, print_json, say

if TYPE_CHECKING:
    from anabranch.lm import Decoder
    from anabranch.serving.config import ServingConfig
    from anabranch.serving.memory import MemoryPlan

# Exit code of a model that does not fit.
NO_FIT = 1

# After which somebody at a terminal is told what takes so long.
PATIENCE_S = 1.0


def show(settings: dict[str, Any], as_json: bool) -> int:
    """Plan a model, a preset or a folder with a config.json alone, and print that; the exit code.

    ``settings`` are paths and values of a `ServeConfig`, resolved as ``anabranch serve`` does.
    """
    from anabranch import presets
    from anabranch.cli.serve import config_of

    config = config_of(None, settings).engine
    is_preset = not Path(config.model).exists() and config.model in presets.names()
    made = planned(config, shape=presets.find(config.model)("tiny").model if is_preset else None)
    if as_json:
        print_json(made.to_dict())
    else:
        print_plan(made)
    return 0 if made.fits else NO_FIT


def planned(config: ServingConfig, *, shape: Decoder.Config | None = None) -> MemoryPlan:
    """`plan_memory`; a terminal that waits is told for what."""
    from anabranch.serving.memory import plan_memory

    note = threading.Timer(PATIENCE_S, say, ["measuring what the program takes without a model ..."])
    if sys.stderr.isatty():
        note.start()
    try:
        return plan_memory(config, shape=shape)
    finally:
        note.cancel()


def print_plan(plan: MemoryPlan, *, to: TextIO | None = None) -> None:
    """What goes where, and how large it is."""
    out = to or sys.stdout
    config = plan.config
    fact("plan", f"{config.model}   in {_size(plan.memory)}: weights {_how(config)}{_where(plan)}", to=out)
    rows = [("weights", plan.rest, "beside experts" if plan.experts else "all of them")]
    if plan.experts:
        rows.append(("experts", plan.resident, f"{plan.resident / plan.experts:.0%} of {_size(plan.experts)}"))
    if plan.adapters:
        rows.append(("adapters", plan.adapters, "that requests may use"))
    rows += [
        ("keys", plan.kv, "and values of requests"),
        ("work", plan.work, "at most, of a step or of loading"),
        ("program", plan.program, "measured, with a margin: interpreters and libraries of all processes, tokenizer"),
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
    if plan.config.expert_budget is None:
        return ", all in memory"
    if plan.resident < plan.experts:
        return ", experts on disk"
    return f", experts on disk and all in memory once used: the budget of {plan.config.expert_budget} is more than they are"


def _how(config: ServingConfig) -> str:
    """In which bits the weights are."""
    from anabranch.errors import AnabranchError
    from anabranch.lm.checkpoint import find_model, quantization_of

    if config.quantize == "stored":
        return "in the bits of the file where kernels take them"
    if config.quantize != "none":
        return f"in {config.quantize}"
    try:
        saved = quantization_of(find_model(config.model))
    except AnabranchError:
        # A preset.
        saved = None
    if saved is None:
        return "as stored or in the type of the model"
    return f"in {saved['scheme']}, as they are saved"


def _size(num_bytes: int) -> str:
    return binary_size(num_bytes)
