"""What a model can reach on hardware, and the pipeline of nano-batches that comes near it; what ``anabranch plan`` calls.

    estimate(find_shape("llama-2-70b"), find_hardware("a100", 8))  what bounds it: `cost`, `hardware`, `shape`
    search(...)  ->  Pipeline                                      cuts, order, shares: `graph`, `order`, `interference`, `search`
    pipeline.timeline()                                            what happens, as a picture: `simulate`

The formulas and the search are NanoFlow's (Zhu et al., arXiv 2408.12757). Nothing here needs torch but `measure`, which profiles the
machine. `anabranch.serving.nanoflow` runs what was found.
"""

from anabranch.serving.planning.cost import Estimate, OpCost, Workload, estimate, fitting_devices, largest_batch
from anabranch.serving.planning.graph import LayerGraph, NanoGraph, NanoOp, Operation, layer_graph
from anabranch.serving.planning.hardware import PROFILES, Efficiency, Hardware, find_hardware
from anabranch.serving.planning.interference import PAPER_TABLE, ShareTable
from anabranch.serving.planning.search import Pipeline, load_pipeline, search
from anabranch.serving.planning.shape import PUBLISHED, ModelShape, find_shape, shape_of
from anabranch.serving.planning.simulate import Schedule, Timeline, gantt, save_gantt, simulate

__all__ = [
    "PAPER_TABLE",
    "PROFILES",
    "PUBLISHED",
    "Efficiency",
    "Estimate",
    "Hardware",
    "LayerGraph",
    "ModelShape",
    "NanoGraph",
    "NanoOp",
    "OpCost",
    "Operation",
    "Pipeline",
    "Schedule",
    "ShareTable",
    "Timeline",
    "Workload",
    "estimate",
    "find_hardware",
    "find_shape",
    "fitting_devices",
    "gantt",
    "largest_batch",
    "layer_graph",
    "load_pipeline",
    "save_gantt",
    "search",
    "shape_of",
    "simulate",
]
