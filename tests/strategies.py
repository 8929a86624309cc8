"""Hypothesis strategies and small random values that several tests share."""

import torch
from hypothesis import strategies as st

from anabranch.routing import UNUSED, Routing


def random_routing(num_items, num_destinations, num_choices, *, seed=0, dtype=torch.float32, unused=0.0):
    """Distinct destinations per item, in no particular order; a share ``unused`` of the choices names none."""
    generator = torch.Generator().manual_seed(seed)
    score_NE = torch.rand(num_items, num_destinations, generator=generator, dtype=dtype)
    index_NK = torch.rand(num_items, num_destinations, generator=generator).argsort(-1)[:, :num_choices]
    routing = Routing(index_NK, score_NE.gather(-1, index_NK), score_NE)
    return routing.drop(torch.rand(num_items, num_choices, generator=generator) < unused)


@st.composite
def routings(draw, max_items=12, max_destinations=6, min_items=0):
    """Routings of every shape, some with unused choices."""
    num_items = draw(st.integers(min_items, max_items))
    num_destinations = draw(st.integers(1, max_destinations))
    return random_routing(
        num_items,
        num_destinations,
        draw(st.integers(1, num_destinations)),
        seed=draw(st.integers(0, 2**16)),
        unused=draw(st.sampled_from([0.0, 0.3, 1.0])),
    )


@st.composite
def value_tables(draw, max_items=8, max_destinations=8, min_destinations=1):
    """fp32 ``[N, E]`` with many ties, both zeros, and closed entries (minus infinity)."""
    num_items, num_destinations = (
        draw(st.integers(0, max_items)),
        draw(st.integers(min_destinations, max_destinations)),
    )
    some = st.sampled_from([-float("inf"), -2.0, -1e-30, -0.0, 0.0, 0.25, 0.5, 1.0, 3e30])
    rows = draw(
        st.lists(
            st.lists(some, min_size=num_destinations, max_size=num_destinations),
            min_size=num_items,
            max_size=num_items,
        )
    )
    return torch.tensor(rows, dtype=torch.float32).view(num_items, num_destinations)


def naive_top_k(values, top_k):
    """Indices of the ``top_k`` largest of a list, ties to the lowest index, closed ones (minus infinity) as UNUSED."""
    order = sorted(range(len(values)), key=lambda e: (-values[e], e))[:top_k]
    return [e if values[e] > -float("inf") else UNUSED for e in order]
