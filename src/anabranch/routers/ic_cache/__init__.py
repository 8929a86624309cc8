"""IC-Cache: a large model's past answers as examples for a small one, and a router that minds the load (SOSP 2025, arXiv 2501.12689)."""

from anabranch.routers.ic_cache.ic_cache import ICCache
from anabranch.routers.ic_cache.pool import ExamplePool
from anabranch.routers.ic_cache.records import Arm, Response
from anabranch.routers.ic_cache.router import Router
from anabranch.routers.ic_cache.selector import Selector
from anabranch.routers.ic_cache.strategy import ICCacheRouting
from anabranch.routers.ic_cache.upkeep import Manager

__all__ = ["Arm", "ExamplePool", "ICCache", "ICCacheRouting", "Manager", "Response", "Router", "Selector"]
