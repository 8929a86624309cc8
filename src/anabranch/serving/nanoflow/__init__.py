"""NanoFlow (Zhu et al., arXiv 2408.12757): nano-batches whose operations run side by side on one device.

    estimate(find_shape("llama-2-70b"), find_hardware("a100", 8))  what a model can reach: `cost`, `hardware`, `shape`
    search(...)  ->  Pipeline                                      cuts, order, shares: `graph`, `order`, `interference`, `search`
    pipeline.timeline()                                            what happens, as a picture: `simulate`
    NanoRunner(model, pipeline=pipeline, ...)                      steps that run so: `execute`, `runtime`
    TieredPool(...) with `core.offload.LruTier`                    keys and values on host and disk: `offload`

The first three need no torch; import the others from their modules.
"""

from anabranch.serving.nanoflow.cost import Estimate, OpCost, Workload, estimate, fitting_devices, largest_batch
from anabranch.serving.nanoflow.graph import LayerGraph, NanoGraph, NanoOp, Operation, layer_graph
from anabranch.serving.nanoflow.hardware import PROFILES, Efficiency, Hardware, find_hardware
from anabranch.serving.nanoflow.interference import PAPER_TABLE, ShareTable
from anabranch.serving.nanoflow.search import Pipeline, load_pipeline, search
from anabranch.serving.nanoflow.shape import PUBLISHED, ModelShape, find_shape, shape_of
from anabranch.serving.nanoflow.simulate import Schedule, Timeline, gantt, save_gantt, simulate

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
