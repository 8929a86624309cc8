"""What the other models would have said: stored questions are asked of every model and judged, until there is a table of all outcomes.

async with Gateway(for_collecting(config)) as gateway:
    collector = Collector(gateway, models, judge, per_minute=60)
    await collector.run(Path("outcomes.jsonl"), limit=500)
"""

from anabranch.gateway.collect.calls import Calls, OutOfBudgetError, Said, call_key
from anabranch.gateway.collect.collector import Collected, Collector, for_collecting
from anabranch.gateway.store import COLLECT as TAG

__all__ = ["TAG", "Calls", "Collected", "Collector", "OutOfBudgetError", "Said", "call_key", "for_collecting"]
