"""`Services`: what one request needs of the gateway it came to, and nothing else of it."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from anabranch.gateway.caches import Caches
from anabranch.gateway.core.admission import Admission
from anabranch.gateway.core.finished import Finished, Priced
from anabranch.gateway.core.relay import Ahead
from anabranch.gateway.core.unsettled import Unsettled
from anabranch.gateway.metrics import Metrics
from anabranch.gateway.observe.trace_context import Trace
from anabranch.gateway.store import KeyRecord, Store
from anabranch.web.turns import Turns


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What a request is lent.

    Attributes:
        store: open.
        authenticate: the record of a key, None where none is needed. Raises ApiError.
        admission: of requests and tokens, by key.
        turns: large bodies are counted, and their keys in caches made, in another thread.
        caches: of the config that the request began on.
        metrics: of the process.
        unsettled: requests that are over, and whose row is still to be written.
        keep_task: has a task end before the gateway does.
        ahead: what streams hold for slow readers, in all.
        begin_trace: the trace of a request with these headers; None for none.
        on_finished: told, once, that the request is over.
        on_priced: told, once and after that, what it cost.
    """

    store: Store
    authenticate: Callable[[str | None], Awaitable[KeyRecord | None]]
    admission: Admission
    turns: Turns
    caches: Caches
    metrics: Metrics
    unsettled: Unsettled
    keep_task: Callable[[asyncio.Task[Any]], None]
    ahead: Ahead
    begin_trace: Callable[[Mapping[str, str]], Trace | None]
    on_finished: Callable[[Finished], None]
    on_priced: Callable[[Priced], None]
