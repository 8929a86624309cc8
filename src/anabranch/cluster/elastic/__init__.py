"""ElasWave: training that keeps its computation when ranks are lost or come (arXiv 2510.00606).

    from anabranch.cluster.elastic import Grid, plan

    grid = Grid.full(replicas=8, stages=12).without([3])
    plan(grid, [1e-3] * 64, global_batch=1024, micro_batches=16).step_s

`cuts` and `layout` say who has which samples and numbers, `planner` what to do with the ranks that are left, `simulator` what a step takes
then, ours and by two other ways. These need numpy alone.
"""

from typing import TYPE_CHECKING

from anabranch.extras import lazy

if TYPE_CHECKING:
    from anabranch.cluster.elastic.cuts import bounds, recut
    from anabranch.cluster.elastic.layout import Grid, Layout, Move, census, moves
    from anabranch.cluster.elastic.planner import ElasticPlan, Policy, plan
    from anabranch.cluster.elastic.simulator import Compared, compare
    from anabranch.cluster.elastic.stages import Memory

__all__ = [
    "Compared",
    "ElasticPlan",
    "Grid",
    "Layout",
    "Memory",
    "Move",
    "Policy",
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
    "Memory": ".stages",
}
__getattr__, __dir__ = lazy(__name__, _HOMES)
