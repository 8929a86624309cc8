"""NanoFlow (Zhu et al., arXiv 2408.12757): steps whose nano-operations run side by side on one device.

search(...)  ->  Pipeline                in `anabranch.serving.planning`
find_pipeline(model, config)             read from a file or searched, for an engine's config: `options`
StepPlan.of(pipeline)                    its cuts, order and shares for steps of any size: `step_plan`
NanoRunner(model, pipeline=..., ...)     steps that run so: `runtime`, `execute`
"""

from anabranch.routing.renamed import moved
from anabranch.serving import planning

__getattr__ = moved(__name__, dict.fromkeys(planning.__all__, "anabranch.serving.planning"))
