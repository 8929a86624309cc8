"""ExpertFlow: a mixture of experts in a small fast memory (arXiv 2410.17954); `anabranch.serving.expertflow.expertflow` maps the paper's parts."""

from anabranch.serving.expertflow.expertflow import OffloadEngine, find_pools, offload
from anabranch.serving.expertflow.layout import Expert, Layout
from anabranch.serving.expertflow.loading import load_offloaded
from anabranch.serving.expertflow.routes import Routes

__all__ = ["Expert", "Layout", "OffloadEngine", "Routes", "find_pools", "load_offloaded", "offload"]
