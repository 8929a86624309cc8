"""The public face of each package is what its ``__init__`` lists. A change here is a change for users: say so in the changelog.

To print the list of a package: ``python -c "import anabranch.routing as p; print(*p.__all__)"``.
"""

import importlib
import inspect

import pytest

PUBLIC = {
    "anabranch.config": "Config Field Part configclass from_dict override parse_assignment to_dict",
    "anabranch.routing": """
        UNUSED Balancer BiasBalancer Candidates CosineScore Decisions DeviceLoss DispatchPlan ExpertChoice GroupTopK
        ImportanceLoss LinearScore PoolLoss Recorder Router Routing RoutingContext RoutingTrace Score Select SwitchLoss Threshold
        TopK TopP TraceBuilder TraceLayer TraceWriter ZLoss capacity_of combine count_destinations discard_loads dispatch
        limit_capacity pad_rows plan_dispatch record_routing sync_loads unpad_rows
    """,
}


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_the_pinned_ones(package):
    assert sorted(importlib.import_module(package).__all__) == sorted(PUBLIC[package].split())


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_there_and_documented(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{package}.{name} has no docstring"
