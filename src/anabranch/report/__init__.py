"""A routing report: pictures and a self-contained HTML page of a `RoutingTrace`.

write_report(RoutingTrace.read("trace.parquet"), "report", title="my model")     # -> report/report.html

Needs the extras ``lm`` and ``plots``; `style`, in which every picture of ours is drawn, needs ``plots`` only. Names are loaded when
they are first used.
"""

from typing import TYPE_CHECKING

from anabranch.extras import lazy

if TYPE_CHECKING:
    from anabranch.report.caching import CacheFacts
    from anabranch.report.summary import LayerFacts, PoolFacts, Summary, summarize
    from anabranch.report.words import explain
    from anabranch.report.write import write_report

__all__ = ["CacheFacts", "LayerFacts", "PoolFacts", "Summary", "explain", "summarize", "write_report"]
__getattr__, __dir__ = lazy(
    __name__,
    {
        "CacheFacts": ".caching",
        **dict.fromkeys(("LayerFacts", "PoolFacts", "Summary", "summarize"), ".summary"),
        "explain": ".words",
        "write_report": ".write",
    },
)
