"""SCALE: deliberate thinking (System 2) for the hard steps of a problem alone.

    D = s_1 .. s_n of P;   d_i = difficulty of s_i;   m_i = LLM2 if d_i > tau else LLM1;   S(s_i) = m_i(C_i, s_i);   answer = box of S(s_n)

Source: Xiao, Xu, Yuan, Wang, Li, Liu, "SCALE: Selective Resource Allocation for Overcoming Performance Bottlenecks in Mathematical
Test-time Scaling" (AAAI 2026, arXiv 2512.00466). Departures: docs/systems/scale.md.

As a library, over whatever asks models, `SelectiveReasoner`; in a gateway the strategy ``scale``, for ``auto/scale``.
"""

from typing import TYPE_CHECKING

from anabranch.extras import lazy

if TYPE_CHECKING:
    from anabranch.routers.scale.assess import Assessor, Constant, Disagreement, Entropy, Oracle, PromptScore
    from anabranch.routers.scale.calls import Budget
    from anabranch.routers.scale.client_ask import ClientAsk
    from anabranch.routers.scale.decompose import Decomposer, Given, Identity, Prompted
    from anabranch.routers.scale.engine_ask import EngineAsk
    from anabranch.routers.scale.probe import Probe
    from anabranch.routers.scale.program import Scale
    from anabranch.routers.scale.reasoner import SelectiveReasoner
    from anabranch.routers.scale.records import Trace
    from anabranch.routers.scale.rules import Budgeted, Rule, Score, Threshold, TopFraction
    from anabranch.routers.scale.work import Problem, Settings, System

_WHERE = {
    ".assess": ("Assessor", "Constant", "Disagreement", "Entropy", "Oracle", "PromptScore"),
    ".calls": ("Budget",),
    ".client_ask": ("ClientAsk",),
    ".decompose": ("Decomposer", "Given", "Identity", "Prompted"),
    ".engine_ask": ("EngineAsk",),
    ".probe": ("Probe",),
    ".program": ("Scale",),
    ".reasoner": ("SelectiveReasoner",),
    ".records": ("Trace",),
    ".rules": ("Budgeted", "Rule", "Score", "Threshold", "TopFraction"),
    ".work": ("Problem", "Settings", "System"),
}

__all__ = [
    "Assessor",
    "Budget",
    "Budgeted",
    "ClientAsk",
    "Constant",
    "Decomposer",
    "Disagreement",
    "EngineAsk",
    "Entropy",
    "Given",
    "Identity",
    "Oracle",
    "Probe",
    "Problem",
    "PromptScore",
    "Prompted",
    "Rule",
    "Scale",
    "Score",
    "SelectiveReasoner",
    "Settings",
    "System",
    "Threshold",
    "TopFraction",
    "Trace",
]

__getattr__, __dir__ = lazy(__name__, {name: module for module, names in _WHERE.items() for name in names})
