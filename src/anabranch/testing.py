"""Contract checks that ship: what every part that fits a seam must do, ours and anyone's.

    from anabranch.testing import check_feed_forward

    def test_contract():
        check_feed_forward(MyLayer.Config(num_experts=8))

Each check builds the part, puts it through its paces on tiny inputs, and raises AssertionError that says what is broken.
Tolerances: 1e-4 where the same numbers are summed in another order, 2e-2 (of the loss) for bf16.
"""
# Shapes: N items, E destinations, K places per item, B batch, L positions, D width, V vocabulary

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from anabranch.extras import require

require("lm", by=__name__)

import torch
from torch import Tensor, nn

from anabranch.config import Config, from_dict, to_dict
from anabranch.gateway.contract import check_strategy
from anabranch.gateway.providers.contract import check_provider
from anabranch.lm import Decoder
from anabranch.lm.backward_contract import check_gradients, check_second_derivatives, gradients_of_training
from anabranch.lm.replay_contract import check_replay, check_replayed_training
from anabranch.nn import ExpertPool, FeedForward, SelfAttention, SwiGLU
from anabranch.nn.streams import Streams
from anabranch.routing import (
    UNUSED,
    Balancer,
    Override,
    Router,
    Routing,
    RoutingContext,
    Score,
    Select,
    TopK,
    record_routing,
)
from anabranch.routing.balance import LoadCounter, Observation
from anabranch.train.hooks import StepHooks
from anabranch.train.parallel_contract import check_parallel
from anabranch.train.task_contract import check_task

__all__ = [
    "DEVICES",
    "check_balancer",
    "check_feed_forward",
    "check_parallel",
    "check_pool",
    "check_provider",
    "check_router",
    "check_routing",
    "check_score",
    "check_select",
    "check_strategy",
    "check_streams",
    "check_task",
]

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

NUM_ITEMS = 24
VOCAB_SIZE = 61


def check_routing(routing: Routing) -> None:
    """A `Routing` is well formed: shapes agree, destinations exist and are distinct, unused places weigh nothing."""
    num_items, num_places, num_destinations = routing.num_items, routing.num_places, routing.num_destinations
    _is(routing.index_NK.dtype == torch.int64, f"index_NK is {routing.index_NK.dtype}, not int64")
    _is(routing.weight_NK.shape == (num_items, num_places), "weight_NK has another shape than index_NK")
    _is(routing.score_NE.shape[0] == num_items, "score_NE has another number of items than index_NK")
    index_NK = routing.index_NK
    _is(
        ((index_NK >= UNUSED) & (index_NK < num_destinations)).all(), f"an index is not in -1 to {num_destinations - 1}"
    )
    _is((routing.weight_NK[index_NK == UNUSED] == 0).all(), "an unused place has a weight that is not 0")
    _is(torch.isfinite(routing.weight_NK).all(), "a weight is not finite")
    used_NE = torch.zeros(num_items, num_destinations + 1, dtype=torch.int64, device=index_NK.device)
    used_NE.scatter_add_(1, torch.where(index_NK < 0, num_destinations, index_NK), torch.ones_like(index_NK))
    _is((used_NE[:, :num_destinations] <= 1).all(), "an item has one destination twice")
    _is(routing.load_E().sum() == routing.used_NK.sum(), "loads do not sum to the used places")


def check_score(config: Score.Config, *, dim: int = 16, num_destinations: int = 8) -> None:
    """The contract of the family ``score``."""
    _check_config(config)
    generator = torch.Generator().manual_seed(0)
    score: Score = config.build(dim, num_destinations, generator=generator)
    twin: Score = config.build(dim, num_destinations, generator=torch.Generator().manual_seed(0))
    _check_same_state(score, twin, "built twice from one seed")
    counted, real = config.num_parameters(dim, num_destinations), _num_parameters(score)
    _is(counted == real, f"num_parameters says {counted}, there are {real}")
    x_ND = torch.randn(NUM_ITEMS, dim, generator=generator)
    context = RoutingContext()
    logit_NE = score.project(x_ND, context)
    _is(score.hands_on or not context.carry, "project leaves something in context.carry, but hands_on is False")
    _is(logit_NE.shape == (NUM_ITEMS, num_destinations), f"logits have shape {list(logit_NE.shape)}, not [N, E]")
    _is(logit_NE.dtype == torch.float32, f"logits of fp32 items are {logit_NE.dtype}")
    _is(score.project(x_ND[:0], RoutingContext()).shape == (0, num_destinations), "no items do not give no logits")
    order_N = torch.randperm(NUM_ITEMS, generator=generator)
    if score.is_causal:
        _close(score.project(x_ND[order_N], RoutingContext()), logit_NE[order_N], "logits of permuted items")
    with torch.autocast("cpu", torch.bfloat16):
        _close(score.project(x_ND, RoutingContext()), logit_NE, "logits under autocast (they must stay fp32)")
        _is(
            score.project(x_ND.bfloat16(), RoutingContext()).dtype == torch.float32, "logits of bf16 items are not fp32"
        )
    score_NE = score.activate(logit_NE)
    _is((score_NE >= 0).all() and torch.isfinite(score_NE).all(), "a score is negative or not finite")
    closed_NE = logit_NE.masked_fill(torch.arange(num_destinations) == 1, -torch.inf)
    _is((score.activate(closed_NE)[:, 1] == 0).all(), "a logit of minus infinity does not score 0")
    (score_NE * torch.randn(NUM_ITEMS, num_destinations, generator=generator)).sum().backward()
    _check_gradients(score)
    _check_copies(score, lambda module: module.project(x_ND, RoutingContext()))


def check_select(config: Select.Config, *, num_destinations: int = 16) -> None:
    """The contract of the family ``select``."""
    _check_config(config)
    select: Select = config.build(num_destinations)
    generator = torch.Generator().manual_seed(0)
    logit_NE = torch.randn(NUM_ITEMS, num_destinations, generator=generator, requires_grad=True)
    score_NE = logit_NE.softmax(-1)
    routing = select(score_NE, logit_NE=logit_NE)
    check_routing(routing)
    _is(routing.used_NK.any(), "nothing was chosen")
    told = (None, routing.num_places)
    _is(select.num_places in told, f"num_places is {select.num_places}, but there are {routing.num_places}")
    _is(torch.equal(select(score_NE, logit_NE=logit_NE).index_NK, routing.index_NK), "two calls choose differently")
    routing.weight_NK.square().sum().backward()
    _is(torch.isfinite(logit_NE.grad).all(), "a gradient is not finite")  # type: ignore[arg-type]
    check_routing(select(score_NE[:0]))
    order_N = torch.randperm(NUM_ITEMS, generator=generator)
    permuted = select(score_NE[order_N], logit_NE=logit_NE[order_N])
    _is(torch.equal(permuted.index_NK, routing.index_NK[order_N]), "permuting items does not permute choices")
    for open_NE in (
        torch.arange(num_destinations) % 3 > 0,
        torch.rand(NUM_ITEMS, num_destinations, generator=generator) < 0.4,
        torch.zeros(NUM_ITEMS, 1, dtype=torch.bool),
    ):
        bias_E = torch.randn(num_destinations, generator=generator) * 100
        limited = select(score_NE, logit_NE=logit_NE, bias_E=bias_E, open_NE=open_NE)
        check_routing(limited)
        chosen_NK = open_NE.expand_as(score_NE).gather(1, limited.index_NK.clamp_min(0))
        _is(chosen_NK[limited.used_NK].all(), "a closed destination was chosen")
    if select.is_causal:  # an item's choice is its own
        _is(torch.equal(select(score_NE[:1]).index_NK, routing.index_NK[:1]), "a choice depends on other items")


def check_balancer(config: Balancer.Config, *, num_destinations: int = 16) -> None:
    """The contract of the family ``balance``."""
    _check_config(config)
    balancer: Balancer = config.build(num_destinations)
    open_E = torch.arange(num_destinations) % 2 == 0
    mask_N = torch.arange(NUM_ITEMS) % 4 != 1
    for num_items, open_NE, item_mask_N in (
        (NUM_ITEMS, None, None),
        (NUM_ITEMS, open_E, None),
        (NUM_ITEMS, open_E.expand(NUM_ITEMS, num_destinations), mask_N),
        (NUM_ITEMS, None, torch.zeros(NUM_ITEMS, dtype=torch.bool)),
        (0, None, None),
    ):
        logit_NE = torch.randn(num_items, num_destinations, generator=torch.Generator().manual_seed(0))
        logit_NE.requires_grad_()
        seen = _observe(logit_NE, open_NE, item_mask_N)
        context = RoutingContext(training=True, sequence_length=4, item_mask_N=item_mask_N)
        balancer(seen, context)
        context.commit()
        losses = context.mean_losses()
        for name, loss in losses.items():
            _is(loss.dim() == 0 and torch.isfinite(loss), f"loss {name} is {loss}, not one finite number")
            if not seen.routing.used_NK.any():
                _is(loss == 0, f"loss {name} is {loss} where there are no items")
        if losses:
            sum(losses.values()).backward()  # type: ignore[union-attr]
            gradient_NE = logit_NE.grad
            _is(gradient_NE is not None and torch.isfinite(gradient_NE).all(), "a gradient is missing or not finite")
            if item_mask_N is not None:
                _is((gradient_NE[~item_mask_N] == 0).all(), "padding has a gradient")  # type: ignore[index]
            if open_NE is not None:
                _is((gradient_NE[:, ~open_E] == 0).all(), "a closed destination has a gradient")  # type: ignore[index]
    hooks = StepHooks(balancer, 3)
    for step in range(3):
        hooks.run_after(step)
    bias_E = balancer.bias_E
    if bias_E is not None:
        _is(bias_E.shape == (num_destinations,) and torch.isfinite(bias_E).all(), "bias_E is not [E] and finite")
        _is(bias_E.dtype == torch.float32 and not bias_E.requires_grad, "bias_E must be fp32 and without gradient")
        cast_E = copy.deepcopy(balancer).bfloat16().bias_E
        _is(cast_E is not None and cast_E.dtype == torch.float32, "a model that is cast to bf16 casts its bias")
    twin = config.build(num_destinations)
    twin.load_state_dict(balancer.state_dict())
    _check_same_state(twin, balancer, "loaded from a state dict")


def _observe(logit_NE: Tensor, open_NE: Tensor | None, item_mask_N: Tensor | None) -> Observation:
    masked_NE = logit_NE if open_NE is None else logit_NE.masked_fill(~open_NE, -torch.inf)
    routing = TopK.Config(top_k=2).build(logit_NE.shape[1])(masked_NE.softmax(-1), open_NE=open_NE)
    if item_mask_N is not None:
        routing = routing.drop(~item_mask_N.unsqueeze(-1))
    return Observation(logit_NE, routing, open_NE)


def check_router(router: Router, *, dim: int, device: str = "cpu") -> None:
    """A router gives well-formed routings, keeps padding out, counts in training only, and learns."""
    router = copy.deepcopy(router).to(device)
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(NUM_ITEMS, dim, generator=generator).to(device)
    mask_N = (torch.arange(NUM_ITEMS) % 4 != 1).to(device)
    quiet = RoutingContext(sequence_length=4)
    routing = router(x_ND, quiet)
    check_routing(routing)
    check_routing(router(x_ND[:0], RoutingContext(training=True, sequence_length=4)))
    check_routing(router(x_ND.bfloat16(), RoutingContext(sequence_length=4)))
    _is(not quiet.losses and not quiet.loads and not quiet.parts, "a balancer emits outside training")
    if router.select.is_causal and router.score.is_causal:
        order_N = torch.randperm(NUM_ITEMS, generator=generator).to(device)
        permuted = router(x_ND[order_N], RoutingContext())
        _is(torch.equal(permuted.index_NK, routing.index_NK[order_N]), "permuting items does not permute choices")
        _close(permuted.weight_NK, routing.weight_NK[order_N], "weights of permuted items")
    padded = router(x_ND, RoutingContext(item_mask_N=mask_N))
    check_routing(padded)
    _is((padded.index_NK[~mask_N] == UNUSED).all(), "a padding item is routed")
    _check_overrides(router, x_ND, mask_N)
    context = RoutingContext(training=True, sequence_length=4, item_mask_N=mask_N)
    routing = router(x_ND, context)
    context.commit()
    for module in router.modules():
        if isinstance(module, LoadCounter) and module.load_E.any():
            _is(
                torch.equal(module.load_E, routing.load_E().float()), "a balancer counts other loads than the routing's"
            )
    losses = context.mean_losses()
    (routing.weight_NK.square().sum() + sum(losses.values())).backward()
    _check_gradients(router)
    _check_copies(router, lambda module: module(x_ND, RoutingContext()).weight_NK)


@dataclass(frozen=True)
class _Says:
    """The same override for every router."""

    override: Override

    def of(self, router: nn.Module, visit: int, x_ND: Tensor, context: RoutingContext) -> Override:
        return self.override


def _check_overrides(router: Router, x_ND: Tensor, mask_N: Tensor) -> None:
    """What is closed is not chosen, what is forced is, and balancers see neither."""
    num_destinations = router.num_destinations
    index_NK = torch.arange(NUM_ITEMS).unsqueeze(-1) % num_destinations
    closed_E = torch.arange(num_destinations) % 2 == 1

    def run(**changes: Any) -> Routing:
        said = _Says(Override(**changes))
        context = RoutingContext(training=True, sequence_length=4, item_mask_N=mask_N, routing=[said])
        routing = router(x_ND, context)
        check_routing(routing)
        _is(not (context.losses or context.loads or context.parts), "a balancer sees overridden decisions")
        return routing

    routing = run(open_NE=~closed_E)
    chosen_NK = closed_E.to(x_ND.device)[routing.index_NK.clamp_min(0)] & routing.used_NK
    _is(not chosen_NK.any(), "a destination that an override closes was chosen")
    run(bias_NE=torch.linspace(-100, 100, num_destinations))
    for changes in ({}, {"weight_NK": torch.full((NUM_ITEMS, 1), 0.5)}):
        routing = run(index_NK=index_NK, **changes)
        expected_NK = index_NK.to(x_ND.device).masked_fill(~mask_N.unsqueeze(-1), UNUSED)
        _is(torch.equal(routing.index_NK, expected_NK), "a forced destination was not taken")


def check_pool(pool: ExpertPool, *, device: str = "cpu") -> None:
    """A pool equals its experts one by one, in values and gradients, and leaves idle experts alone."""
    pool = copy.deepcopy(pool).to(device).float()
    generator = torch.Generator().manual_seed(0)
    num_experts = pool.num_experts
    x_ND = torch.randn(NUM_ITEMS, pool.dim, generator=generator).to(device).requires_grad_()
    score_NE = torch.rand(NUM_ITEMS, num_experts, generator=generator).to(device)
    routing = TopK.Config(top_k=min(2, num_experts)).build(num_experts)(
        score_NE, open_NE=torch.arange(num_experts, device=device) < max(1, num_experts - 1)
    )
    y_ND = pool(x_ND, routing)
    expected_ND = _naive_experts(pool, x_ND, routing)
    _close(y_ND, expected_ND, "the output")
    direction_ND = torch.randn(y_ND.shape, generator=generator).to(device)
    inputs = (x_ND, pool.w13, pool.w2)
    ours = torch.autograd.grad((y_ND * direction_ND).sum(), inputs)
    naive = torch.autograd.grad((expected_ND * direction_ND).sum(), inputs)
    for name, gradient, wanted in zip(("x", "w13", "w2"), ours, naive, strict=True):
        _close(gradient, wanted, f"the gradient of {name}")
        if num_experts > 1 and name != "x":
            _is((gradient[-1] == 0).all(), f"an idle expert has a gradient in {name}")
    empty = Routing(routing.index_NK[:0], routing.weight_NK[:0], routing.score_NE[:0])
    _is(pool(x_ND[:0], empty).shape == (0, pool.dim), "no items do not give no outputs")
    _check_copies(pool, lambda module: module(x_ND, routing))


def _naive_experts(pool: ExpertPool, x_ND: Tensor, routing: Routing) -> Tensor:
    rows = []
    for n in range(routing.num_items):
        y_D = torch.zeros_like(x_ND[n])
        for e, weight in zip(routing.index_NK[n].tolist(), routing.weight_NK[n], strict=True):
            if e != UNUSED:
                gate_F, up_F = (pool.w13[e] @ x_ND[n]).chunk(2)
                y_D = y_D + weight * (pool.w2[e] @ (nn.functional.silu(gate_F) * up_F))
        rows.append(y_D)
    return torch.stack(rows)


# -- the contract of a feed-forward design, checked inside a decoder, where it lives


def check_feed_forward(
    config: FeedForward.Config,
    *,
    num_layers: int = 4,
    dim: int = 32,
    device: str = "cpu",
    compile_backend: str = "aot_eager",
) -> None:
    """The contract of the family ``feed_forward``: all that trainer, generation, checkpoints and traces rely on.

    Args:
        config: the design, with small sizes.
        num_layers: depth of the decoder it is put in (at least what the design needs).
        dim: width of that decoder.
        device: where to check, one of `DEVICES`.
        compile_backend: of ``torch.compile``; ``inductor`` is slow to compile, ``aot_eager`` checks the same graph.
    """
    model_config = Decoder.Config(
        vocab_size=VOCAB_SIZE,
        dim=dim,
        num_layers=num_layers,
        attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
        feed_forward=config,
        max_positions=64,
        init_std=0.2,  # far from even scores, so rounding does not decide who is chosen
    )
    _check_model(model_config, device, compile_backend)


def check_streams(
    config: Streams.Config,
    *,
    num_layers: int = 2,
    dim: int = 32,
    device: str = "cpu",
    compile_backend: str = "aot_eager",
) -> None:
    """The contract of the family ``streams``: what `check_feed_forward` asks of a dense decoder that runs as these streams.

    Also, the backbone must start as the plain model of the same seed does. Arguments as for `check_feed_forward`.
    """
    model_config = Decoder.Config(
        vocab_size=VOCAB_SIZE,
        dim=dim,
        num_layers=num_layers,
        attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
        feed_forward=SwiGLU.Config(hidden_dim=2 * dim),
        max_positions=64,
        init_std=0.2,
        streams=config,
    )
    state = model_config.build(seed=0).state_dict()
    for name, value in model_config.replace(streams=None).build(seed=0).state_dict().items():
        _is(torch.equal(state[name], value), f"{name} does not start as in the plain model of the same seed")
    _check_model(model_config, device, compile_backend)


def _check_model(model_config: Decoder.Config, device: str, compile_backend: str) -> None:
    _check_config(model_config)
    model = model_config.build(seed=0).to(device)
    _check_same_state(model, model_config.build(seed=0).to(device), "built twice from one seed")
    counted, real = model_config.count().parameters, _num_parameters(model)
    _is(counted == real, f"count() says {counted} parameters, there are {real}")
    token_BL = torch.randint(0, VOCAB_SIZE, (3, 12), generator=torch.Generator().manual_seed(1)).to(device)
    for check in (
        _check_evaluation,
        _check_cache,
        _check_padding,
        _check_training,
        _check_recompute,
        check_gradients,
        check_second_derivatives,
        _check_state,
        _check_record,
        check_replay,
        check_replayed_training,
        _check_half_precision,
    ):
        check(copy.deepcopy(model), token_BL)
    _check_compile(model, token_BL, compile_backend)
    _check_learning(model, token_BL)


def _check_evaluation(model: Decoder, token_BL: Tensor) -> None:
    model.eval()
    with torch.no_grad(), _no_counting(model):
        logits_BLV = model(token_BL).logits_BLV
        _is(torch.isfinite(logits_BLV).all(), "a logit is not finite")
        _is(torch.equal(model(token_BL).logits_BLV, logits_BLV), "two evaluations differ")
        _close(model(token_BL.flip(0)).logits_BLV, logits_BLV.flip(0), "logits of permuted sequences")
        _is(model(token_BL[:0]).logits_BLV.shape == (0, *logits_BLV.shape[1:]), "an empty batch gives no empty logits")
        if model.is_causal:
            _close(model(token_BL[:, :5]).logits_BLV, logits_BLV[:, :5], "logits of a prefix (later tokens leak)")
            _close(model(token_BL[1:2]).logits_BLV, logits_BLV[1:2], "logits of a sequence on its own")


def _check_cache(model: Decoder, token_BL: Tensor) -> None:
    if not model.is_causal:
        return
    model.eval()
    length = token_BL.shape[1]
    with torch.no_grad(), _no_counting(model):
        expected_BLV = model(token_BL).logits_BLV
        for steps in ([length], [1] * length, [5, *[1] * (length - 5)], [3, 4, length - 7]):
            cache, start, parts = model.new_cache(length), 0, []
            for step in steps:
                parts.append(model(token_BL[:, start : start + step], cache=cache).logits_BLV)
                start += step
            _close(torch.cat(parts, dim=1), expected_BLV, f"cached logits, {steps} tokens at a time,")


def _check_padding(model: Decoder, token_BL: Tensor) -> None:
    model.eval()
    mask_BL = torch.ones_like(token_BL, dtype=torch.bool)
    mask_BL[0, :4] = mask_BL[1, :1] = False
    other_BL = torch.where(mask_BL, token_BL, (token_BL + 7) % VOCAB_SIZE)
    with torch.no_grad():
        logits_BLV = model(token_BL, token_mask_BL=mask_BL).logits_BLV
        _is(torch.isfinite(logits_BLV[mask_BL]).all(), "a logit of a padded batch is not finite")
        other_BLV = model(other_BL, token_mask_BL=mask_BL).logits_BLV
        _close(other_BLV[mask_BL], logits_BLV[mask_BL], "logits of a batch with other tokens in its padding")
        if model.is_causal:
            _close(model(token_BL[:1, 4:]).logits_BLV, logits_BLV[:1, 4:], "logits of a padded sequence")
    seen = _routings(model, lambda: model(token_BL, token_mask_BL=mask_BL))
    for routing in seen:
        _is((routing.index_NK[~mask_BL.flatten()] == UNUSED).all(), "a padding token is routed")
    model.train()
    seen = _routings(model, lambda: model(token_BL, token_mask_BL=mask_BL))
    for router in _routers(model):
        routings, seen = seen[: router.passes], seen[router.passes :]
        load_E = sum(routing.load_E() for routing in routings)
        for part in router.balance:
            if isinstance(part, LoadCounter) and part.load_E.any():
                _is(torch.equal(part.load_E, load_E.float()), "padding is counted in a load")  # type: ignore[union-attr]


def _check_training(model: Decoder, token_BL: Tensor) -> None:
    model.train()
    output = model(token_BL, token_BL.roll(-1, 1))
    _is(torch.isfinite(output.loss), f"the loss is {output.loss}")
    parts = sum(output.auxiliary.values(), start=output.cross_entropy)
    _close(parts, output.loss.detach(), "the loss and the sum of its parts")
    output.loss.backward()
    _check_gradients(model)
    empty = model(token_BL[:0], token_BL[:0])
    _is(empty.loss == 0, f"the loss of an empty batch is {empty.loss}")


def _check_recompute(model: Decoder, token_BL: Tensor) -> None:
    model.train()
    plain, plain_loads = gradients_of_training(model, token_BL), _loads(model)
    model.recompute = True
    again, again_loads = gradients_of_training(model, token_BL), _loads(model)
    for name, gradient in plain.items():
        _close(again[name], gradient, f"with recompute, the gradient of {name}")
    for load_E, again_E in zip(plain_loads, again_loads, strict=True):
        _is(torch.equal(load_E, again_E), "with recompute, a load is counted twice or not at all")


def _check_state(model: Decoder, token_BL: Tensor) -> None:
    model.train()
    gradients = gradients_of_training(model, token_BL)
    other = model.config.build(seed=1).to(token_BL.device)
    other.load_state_dict(model.state_dict())
    twins = {
        "loaded from a state dict": other,
        "deep-copied": copy.deepcopy(model),
        "pickled": pickle.loads(pickle.dumps(model)),
    }
    for how, twin in twins.items():
        _is(_num_parameters(twin) == _num_parameters(model), f"a model {how} has another number of parameters")
        # Gradients, not outputs: if a module that layers share had been copied apart from its owner, they would not arrive.
        for name, gradient in gradients_of_training(twin, token_BL).items():
            _close(gradient, gradients[name], f"in a model {how}, the gradient of {name}")


def _check_record(model: Decoder, token_BL: Tensor) -> None:
    routers = _routers(model)
    if not routers:
        return
    model.eval()
    mask_BL = torch.ones_like(token_BL, dtype=torch.bool)
    mask_BL[0, :4] = False
    with torch.no_grad():
        expected_BLV = model(token_BL, token_mask_BL=mask_BL).logits_BLV
        with record_routing(model) as recorder:
            logits_BLV = model(token_BL, token_mask_BL=mask_BL).logits_BLV
    _is(torch.equal(logits_BLV, expected_BLV), "recording changes the output")
    seen = _routings(model, lambda: model(token_BL, token_mask_BL=mask_BL))
    passes = sum(router.passes for router in routers)
    _is(len(seen) == passes, f"{len(routers)} routers in {passes} passes gave {len(seen)} routings")
    trace = recorder.trace()
    _is(len(trace.layers) == passes, f"the trace has {len(trace.layers)} layers, the model routes in {passes} passes")
    for routing in seen:
        check_routing(routing)
    rows = sum(int(routing.used_NK.sum(-1).clamp_min(1)[mask_BL.flatten()].sum()) for routing in seen)
    _is(trace.table.num_rows == rows, f"the trace has {trace.table.num_rows} rows for {rows} decisions")


def _check_half_precision(model: Decoder, token_BL: Tensor) -> None:
    model.train()
    target_BL = token_BL.roll(-1, 1)
    torch.manual_seed(0)
    loss = model(token_BL, target_BL).loss.detach()
    torch.manual_seed(0)
    with torch.autocast(token_BL.device.type, torch.bfloat16):
        output = model(token_BL, target_BL)
    _is(abs(output.loss - loss) < 2e-2 * loss, f"the loss is {loss}, but {output.loss} under bf16 autocast")
    output.loss.backward()
    _check_gradients(model)
    half = copy.deepcopy(model).bfloat16()
    _is(torch.isfinite(half(token_BL, target_BL).loss), "a model cast to bf16 has no finite loss")


def _check_compile(model: Decoder, token_BL: Tensor, backend: str) -> None:
    torch.compiler.reset()
    plain, compiled = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    expected = gradients_of_training(plain, token_BL)
    call = torch.compile(compiled, fullgraph=True, backend=backend)
    try:
        gradients = gradients_of_training(compiled, token_BL, call)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise AssertionError(f"it does not compile into one graph: {error}") from error
    for name, gradient in gradients.items():
        _close(gradient, expected[name], f"compiled, the gradient of {name}")
    for load_E, compiled_E in zip(_loads(plain), _loads(compiled), strict=True):
        _is(torch.equal(load_E, compiled_E), "compiled, a load is not what it is in eager mode")


def _check_learning(model: Decoder, token_BL: Tensor) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    num_steps = 12
    hooks = StepHooks(model, num_steps)
    for step in range(num_steps):
        hooks.run_before(step)
        loss = model(token_BL, token_BL.roll(-1, 1)).loss
        _is(torch.isfinite(loss), f"the loss is {loss} after {step} steps")
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hooks.run_after(step + 1)
    _is(
        losses[-1] < 0.8 * losses[0],
        f"the loss of one batch over and over goes from {losses[0]:.3f} to {losses[-1]:.3f}",
    )


# -- helpers


def _is(condition: Any, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _close(ours: Tensor, expected: Tensor, what: str, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(
        ours, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what} differ: {text}"
    )


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _check_config(config: Config) -> None:
    again = from_dict(type(config), json.loads(json.dumps(to_dict(config))))
    _is(again == config, f"a config read back from JSON is {again}, it was {config}")


def _check_same_state(ours: nn.Module, expected: nn.Module, how: str) -> None:
    ours_state, state = ours.state_dict(), expected.state_dict()
    _is(ours_state.keys() == state.keys(), f"{how}: state dicts have other names")
    for name, value in state.items():
        _is(torch.equal(ours_state[name], value), f"{how}: {name} differs")


def _check_gradients(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        _is(parameter.grad is not None, f"{name} gets no gradient")
        _is(torch.isfinite(parameter.grad).all(), f"the gradient of {name} is not finite")  # type: ignore[arg-type]


def _check_copies(module: nn.Module, call: Callable[[Any], Tensor]) -> None:
    """A deep copy and a pickled twin give the same, and are apart from the original."""
    expected = call(module).detach()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        _is(torch.equal(call(twin), expected), "a copy gives something else")
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1.0)
    _is(torch.equal(call(module), expected), "a copy shares parameters with the original")


def _loads(model: nn.Module) -> list[Tensor]:
    return [module.load_E.clone() for module in model.modules() if isinstance(module, LoadCounter)]


@contextmanager
def _no_counting(model: nn.Module) -> Iterator[None]:
    before = _loads(model)
    yield
    for load_E, after_E in zip(before, _loads(model), strict=True):
        _is(torch.equal(load_E, after_E), "an evaluation is counted in a load")


def _routers(model: nn.Module) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def _routings(model: nn.Module, run: Callable[[], Any]) -> list[Routing]:
    """What each router returned during ``run``, in order."""
    seen: list[Routing] = []
    handles = [
        router.register_forward_hook(lambda module, args, output: seen.append(output)) for router in _routers(model)
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen
