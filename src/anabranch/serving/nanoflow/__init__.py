"""NanoFlow (Zhu et al., arXiv 2408.12757): steps whose nano-operations run side by side on one device.

search(...)  ->  Pipeline                                      in `anabranch.serving.planning`
Program.of(pipeline)                                           its cuts, order and shares for steps of any size: `program`
NanoRunner(model, program=..., ...)                            steps that run so: `runtime`, `execute`
find_program(model, config)                                    for an engine's config: `options`
"""

from anabranch.routing.renamed import moved

__getattr__ = moved(
    __name__,
    dict.fromkeys(
        (
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
        ),
        "anabranch.serving.planning",
    ),
)
