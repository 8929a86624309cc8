"""`LearningServices`: what learning needs of the gateway, and nothing else of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anabranch.gateway.core.unsettled import Unsettled
from anabranch.gateway.metrics import Metrics
from anabranch.gateway.store import Store

if TYPE_CHECKING:
    from anabranch.gateway.config import GatewayConfig
    from anabranch.gateway.lane import Lane
    from anabranch.gateway.runtime import Runtime


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningServices:
    """What learning is lent, for as long as the gateway lives.

    Attributes:
        open_store: gives the store. Raises InputError before the gateway has started.
        runtime_now: gives what is made from the config that is in use now; a reload puts another in its place.
        unsettled: requests that are over, and whose row is still to be written.
        metrics: of the process.
    """

    open_store: Callable[[], Store]
    runtime_now: Callable[[], "Runtime"]
    unsettled: Unsettled
    metrics: Metrics

    @property
    def store(self) -> Store:
        """The store, open."""
        return self.open_store()

    @property
    def runtime(self) -> "Runtime":
        """In use now."""
        return self.runtime_now()

    @property
    def config(self) -> "GatewayConfig":
        """In use now."""
        return self.runtime_now().config

    @property
    def lanes(self) -> "Mapping[str, Lane]":
        """Strategies at work now, by name."""
        return self.runtime_now().decider.lanes
