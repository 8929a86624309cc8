"""The evidence that ours works: one module per paper, run by ``anabranch study NAME``.

A study module has ``smoke()`` and ``full()``, which return its `Study` in two sizes. A third-party package adds one with an entry
point in the group ``anabranch.studies`` whose value is ``module:function``; the function takes ``full: bool``.
"""

import difflib
import importlib
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from anabranch.errors import ConfigError

if TYPE_CHECKING:
    from anabranch.studies.harness import Study

STUDIES = {
    "alf_lb": "anabranch.studies.alf_lb:make",
    "carl": "anabranch.studies.carl:make",
    "carl_highway": "anabranch.studies.carl_highway:make",
    "chain": "anabranch.studies.chain:make",
    "composition_of_experts": "anabranch.studies.composition_of_experts:make",
    "dr_llm": "anabranch.studies.dr_llm:make",
    "duo_llm": "anabranch.studies.duo_llm:make",
    "elaswave": "anabranch.studies.elaswave:make",
    "elasticmoe": "anabranch.studies.elasticmoe:make",
    "fastrp": "anabranch.studies.fastrp:make",
    "expertflow": "anabranch.studies.expertflow:make",
    "gpipe": "anabranch.studies.gpipe:make",
    "graphrouter": "anabranch.studies.graphrouter:make",
    "graphvite": "anabranch.studies.graphvite:make",
    "hnsw": "anabranch.studies.hnsw:make",
    "g_rank": "anabranch.studies.g_rank:make",
    "fully_ppr": "anabranch.studies.fully_ppr:make",
    "ftp": "anabranch.studies.ftp:make",
    "ic_cache": "anabranch.studies.ic_cache:make",
    "lora_mixer": "anabranch.studies.lora_mixer:make",
    "local_routing_consistency": "anabranch.studies.local_routing_consistency:make",
    "dynmole": "anabranch.studies.dynmole:make",
    "glider": "anabranch.studies.glider:make",
    "mhr": "anabranch.studies.mhr:make",
    "nanoflow": "anabranch.studies.nanoflow:make",
    "packet_spraying": "anabranch.studies.packet_spraying:make",
    "parscale": "anabranch.studies.parscale:make",
    "pccl": "anabranch.studies.pccl:make",
    "powerwalk": "anabranch.studies.powerwalk:make",
    "ppo_tasks": "anabranch.studies.ppo_tasks:make",
    "pvchat": "anabranch.studies.pvchat:make",
    "peft_survey": "anabranch.studies.peft_survey:make",
    "rewiring": "anabranch.studies.rewiring:make",
    "rexmoe": "anabranch.studies.rexmoe:make",
    "rexmoe_grown": "anabranch.studies.rexmoe_grown:make",
    "routing_survey": "anabranch.studies.routing_survey:make",
    "router_r1": "anabranch.studies.router_r1:make",
    "rmoe": "anabranch.studies.rmoe:make",
    "scale": "anabranch.studies.scale:make",
    "tokenring": "anabranch.studies.tokenring:make",
    "ttspm": "anabranch.studies.ttspm:make",
    "versatile": "anabranch.studies.versatile:make",
}


def names() -> list[str]:
    """All studies, built in and installed, sorted."""
    return sorted({*STUDIES, *(point.name for point in entry_points(group="anabranch.studies"))})


def find(name: str) -> "Callable[..., Study]":
    """The function that makes the study ``name``: ``make(full=False, **changes)``.

    Raises ConfigError, with the nearest name, if there is none.
    """
    target = STUDIES.get(name)
    if target is None:
        target = next((point.value for point in entry_points(group="anabranch.studies", name=name)), None)
    if target is None:
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names())}"
        raise ConfigError(f"no study {name!r}; {hint}")
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)
