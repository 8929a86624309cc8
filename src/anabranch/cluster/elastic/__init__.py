"""ElasWave: training that keeps its computation when ranks are lost or come (arXiv 2510.00606).

    from anabranch.cluster.elastic import Grid, plan

    grid = Grid.full(replicas=8, stages=12).without([3])
    plan(grid, [1e-3] * 64, global_batch=1024, micro_batches=16).step_s

    with Coordinator(replicas=2, stages=2) as coordinator: ...          # and on every rank:
    ElasticTrainer(layers, mesh=(2, 2), global_batch=32, optimizer_factory=torch.optim.AdamW, loss=F.cross_entropy,
                   coordinator=coordinator.address)

`cuts` and `layout` say who has which samples and numbers, `planner` what to do with the ranks that are left, `simulator` what a step takes
then, ours and by two other ways. These need numpy alone, and so does the `coordinator`; `trainer` is what ranks run, over `links` of TCP.
"""

from typing import TYPE_CHECKING

from anabranch.extras import lazy

if TYPE_CHECKING:
    from anabranch.cluster.elastic.clocks import FrequencyControl, NvmlFrequency, SimulatedFrequency
    from anabranch.cluster.elastic.control import UnrecoverableError
    from anabranch.cluster.elastic.coordinator import Coordinator
    from anabranch.cluster.elastic.cuts import bounds, recut
    from anabranch.cluster.elastic.layout import Grid, Layout, Move, census, moves
    from anabranch.cluster.elastic.planner import ElasticPlan, Policy, plan
    from anabranch.cluster.elastic.simulator import Compared, compare
    from anabranch.cluster.elastic.stages import Memory
    from anabranch.cluster.elastic.trainer import ElasticTrainer

__all__ = [
    "Compared",
    "Coordinator",
    "ElasticPlan",
    "ElasticTrainer",
    "FrequencyControl",
    "Grid",
    "Layout",
    "Memory",
    "Move",
    "NvmlFrequency",
    "Policy",
    "SimulatedFrequency",
    "UnrecoverableError",
    "bounds",
    "census",
    "compare",
    "moves",
    "plan",
    "recut",
]
_HOMES: dict[str, str | None] = {
    **dict.fromkeys(("bounds", "recut"), ".cuts"),
    **dict.fromkeys(("Grid", "Layout", "Move", "census", "moves"), ".layout"),
    **dict.fromkeys(("ElasticPlan", "Policy", "plan"), ".planner"),
    **dict.fromkeys(("Compared", "compare"), ".simulator"),
    **dict.fromkeys(("FrequencyControl", "NvmlFrequency", "SimulatedFrequency"), ".clocks"),
    "Coordinator": ".coordinator",
    "Memory": ".stages",
    "ElasticTrainer": ".trainer",
    "UnrecoverableError": ".control",
}
__getattr__, __dir__ = lazy(__name__, _HOMES)
