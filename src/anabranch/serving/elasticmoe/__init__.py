"""ElasticMoE: a running expert parallel server that grows and shrinks by a few devices, without downtime and without loading twice.

    engine = ElasticConfig(model="runs/moe", devices=1).build()      # an EngineClient
    await engine.start()
    await engine.control("scale", devices=2)                         # while it serves

Names are imported when they are asked for, since the memory manager's process does without torch.
"""

from anabranch.extras import lazy

__all__ = [
    "Coordinator",
    "ElasticConfig",
    "Group",
    "Placement",
    "Policy",
    "ScalePlan",
    "ScaleReport",
    "place",
    "plan_scale",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "Coordinator": ".coordinator",
        "ElasticConfig": ".config",
        "Group": ".group",
        "Placement": ".plan",
        "Policy": ".policy",
        "ScalePlan": ".plan",
        "ScaleReport": ".report",
        "place": ".plan",
        "plan_scale": ".plan",
    },
)
