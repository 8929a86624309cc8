"""MHR: multi-head routing over an inventory of adapters, for transfer across tasks; with Poly, MHR-z and MHR-mu.

Caccia, Ponti, Su, Pereira, Le Roux, Sordoni: "Multi-Head Adapter Routing for Cross-Task Generalization", NeurIPS 2023, arXiv 2211.03831;
and its parent Poly, Ponti et al. 2022, arXiv 2202.13914.

    put_on(model, {"*.attention.*": MultiHeadRouted.Config(tasks=("a", "b"), skills=8, heads=8, rank=4)})
    with on_tasks(model, "a"): ...
"""

from anabranch.adapters.mhr.few_shot import adapt, merge_task, mu, to_single_lora
from anabranch.adapters.mhr.inventory import AdapterInventory
from anabranch.adapters.mhr.layer import MultiHeadRouted
from anabranch.adapters.mhr.measure import Diagnosis, diagnose, gradient_alignment
from anabranch.adapters.mhr.penalties import Penalties
from anabranch.adapters.mhr.table import RoutingTable, bin_of
from anabranch.adapters.mhr.weights import Weights

__all__ = [
    "AdapterInventory",
    "Diagnosis",
    "MultiHeadRouted",
    "Penalties",
    "RoutingTable",
    "Weights",
    "adapt",
    "bin_of",
    "diagnose",
    "gradient_alignment",
    "merge_task",
    "mu",
    "to_single_lora",
]
