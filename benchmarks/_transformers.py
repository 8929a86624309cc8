"""Transformers as a peer: each of its experts implementations, plain and compiled, and the precision that it computes in.

Its grouped products take no part in autocast: `grouped_mm` casts the rows to the weights' type, so that float32 weights are multiplied
in float32 whatever the block around them says. `cast_grouped_mm` casts both sides first, as autocast does for every other product,
and `check_products` looks at what was multiplied.
"""

import itertools
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

# Ours in their registry: `grouped_mm`, with weights in autocast's type.
CAST = "grouped_mm_autocast"
# Bytes that `batched_mm` may copy: it gathers one expert's matrices for each token and choice, 6 GB a layer at 2048 tokens and 8 choices.
MOST_COPIED = 2**30
# What multiplies matrices, by the names that the profiler has for them.
PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_grouped_mm",
    "transformers::grouped_mm_fallback",
    "mkldnn::_linear_pointwise",
    "mkl::_mkl_linear",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
)
# As the profiler writes C types.
TYPES = {"float": "float32", "c10::BFloat16": "bfloat16", "c10::Half": "float16", "double": "float64"}
ATTRIBUTES = ("num_experts", "has_gate", "has_bias", "is_transposed", "_is_expert_parallel", "has_post_expert_norm")


def cast_grouped_mm(experts: Any, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Their `grouped_mm` of an experts module without biases; under autocast its weights are cast, with gradients to the float32 ones."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    device = x_TD.device.type
    if not torch.is_autocast_enabled(device):
        return grouped_mm_experts_forward(experts, x_TD, index_TK, weight_TK)
    dtype = torch.get_autocast_dtype(device)
    seen = SimpleNamespace(
        **{name: getattr(experts, name) for name in ATTRIBUTES},
        gate_up_proj=experts.gate_up_proj.to(dtype),
        down_proj=experts.down_proj.to(dtype),
        act_fn=experts.act_fn,
        _apply_gate=experts._apply_gate,
    )
    return grouped_mm_experts_forward(seen, x_TD.to(dtype), index_TK, weight_TK)


def register() -> None:
    """Make `CAST` one of their experts implementations."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(CAST, cast_grouped_mm)


def implementations(rows: int, dim: int, hidden: int, layers: int = 1, bytes_each: int = 4) -> tuple[str, ...]:
    """Names of the experts implementations that can compete; ``rows``: of each layer, tokens times choices.

    `batched_mm` is left out where the copies that it makes of weights, and keeps for the backward pass, are more than `MOST_COPIED`.
    """
    copied = layers * rows * 3 * dim * hidden * bytes_each
    return ("eager", CAST, *(("batched_mm",) if copied <= MOST_COPIED else ()))


def label(implementation: str) -> str:
    """As rows name it: what users ask transformers for."""
    return "grouped_mm" if implementation == CAST else implementation


def forget_compiled() -> None:
    """Before each case: the compiler keeps eight versions of a function, and what comes after them runs uncompiled, without a word."""
    torch._dynamo.reset()


def compiled(model: nn.Module, implementation: str) -> Any:
    """``model`` under torch.compile, as users have it. Eager experts have as many rows as the router gives: shapes are left open,
    and what the compiler gives up of their loop runs as it stands."""
    return torch.compile(model, dynamic=None if implementation == "eager" else False)


def products(work: Callable[[], Any]) -> Counter[tuple[str, str]]:
    """How many products ``work`` makes, by operation and element type, forward and backward, in compiled graphs too.

    One that is made of others, as `aten::bmm` is of itself with what autocast has cast, counts as these.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities, record_shapes=True) as seen:
        work()
    recorded: Any = seen.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() in PRODUCTS]
    events.sort(key=lambda event: (event.start_thread_id(), event.start_ns(), -event.end_ns()))
    found: Counter[tuple[str, str]] = Counter()
    for event, after in itertools.zip_longest(events, events[1:]):
        inside = after and after.start_thread_id() == event.start_thread_id() and after.start_ns() < event.end_ns()
        if not inside:
            kind = next((kind for kind in event.dtypes() if kind in TYPES), "?")
            found[event.name(), TYPES.get(kind, kind)] += 1
    return found


def check_products(name: str, work: Callable[[], Any], dtype: str) -> dict[str, int]:
    """The products of ``work`` by element type; ends the program if one is of another type than ``dtype``, or if none was seen."""
    found = products(work)
    other = {f"{operation} {kind}": count for (operation, kind), count in found.items() if kind != dtype}
    if other or not found:
        raise SystemExit(f"{name}: products should be {dtype}, and are {other or 'none that are known'}")
    counted: Counter[str] = Counter()
    for (_, kind), count in found.items():
        counted[kind] += count
    return dict(counted)
