"""IC-Cache: a large model's past answers as examples for a small one, and a router that minds the load (SOSP 2025, arXiv 2501.12689)."""

from anabranch.gateway.ic_cache.ic_cache import ICCache
from anabranch.gateway.ic_cache.manager import Manager
from anabranch.gateway.ic_cache.pool import ExamplePool
from anabranch.gateway.ic_cache.records import Arm, Response
from anabranch.gateway.ic_cache.router import Router
from anabranch.gateway.ic_cache.selector import Selector
from anabranch.gateway.ic_cache.strategy import ICCacheRouting

__all__ = ["Arm", "ExamplePool", "ICCache", "ICCacheRouting", "Manager", "Response", "Router", "Selector"]
