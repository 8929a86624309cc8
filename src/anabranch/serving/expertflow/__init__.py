"""ExpertFlow (arXiv 2410.17954): a mixture of experts in a small fast memory. Module `expertflow` says where the paper's parts are."""

from anabranch.extras import require

require("lm", by=__name__)

from anabranch.serving.expertflow.expertflow import OffloadEngine, offload
from anabranch.serving.expertflow.layout import Expert, Layout
from anabranch.serving.expertflow.loading import load_offloaded
from anabranch.serving.expertflow.pools import find_pools
from anabranch.serving.expertflow.predictors.base import Naming
from anabranch.serving.expertflow.routes import Routes

__all__ = ["Expert", "Layout", "Naming", "OffloadEngine", "Routes", "find_pools", "load_offloaded", "offload"]
