"""The contracts of the parts of a router, and of the router."""
# Shapes: N items, E destinations, K choices per item, D width

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
)
from anabranch.routing.balance import LoadCounter, Observation
from anabranch.testing.shared import (
    NUM_ITEMS,
    check_config,
    check_copies,
    check_has_gradients,
    check_same_state,
    expect,
    expect_close,
    num_parameters,
)
from anabranch.train.hooks import StepHooks


def check_routing(routing: Routing) -> None:
    """A `Routing` is well formed: shapes agree, destinations exist and are distinct, unused choices weigh nothing."""
    num_items, num_choices, num_destinations = routing.num_items, routing.num_choices, routing.num_destinations
    expect(routing.index_NK.dtype == torch.int64, f"index_NK is {routing.index_NK.dtype}, not int64")
    expect(routing.weight_NK.shape == (num_items, num_choices), "weight_NK has another shape than index_NK")
    expect(routing.score_NE.shape[0] == num_items, "score_NE has another number of items than index_NK")
    index_NK = routing.index_NK
    expect(
        ((index_NK >= UNUSED) & (index_NK < num_destinations)).all(), f"an index is not in -1 to {num_destinations - 1}"
    )
    expect((routing.weight_NK[index_NK == UNUSED] == 0).all(), "an unused choice has a weight that is not 0")
    expect(torch.isfinite(routing.weight_NK).all(), "a weight is not finite")
    used_NE = torch.zeros(num_items, num_destinations + 1, dtype=torch.int64, device=index_NK.device)
    used_NE.scatter_add_(1, torch.where(index_NK < 0, num_destinations, index_NK), torch.ones_like(index_NK))
    expect((used_NE[:, :num_destinations] <= 1).all(), "an item has one destination twice")
    expect(routing.load_E().sum() == routing.used_NK.sum(), "loads do not sum to the used choices")


def check_score(config: Score.Config, *, dim: int = 16, num_destinations: int = 8) -> None:
    """The contract of the family ``score``."""
    check_config(config)
    generator = torch.Generator().manual_seed(0)
    score: Score = config.build(dim, num_destinations, generator=generator)
    twin: Score = config.build(dim, num_destinations, generator=torch.Generator().manual_seed(0))
    check_same_state(score, twin, "built twice from one seed")
    counted, real = config.num_parameters(dim, num_destinations), num_parameters(score)
    expect(counted == real, f"num_parameters says {counted}, there are {real}")
    x_ND = torch.randn(NUM_ITEMS, dim, generator=generator)
    token_N = torch.arange(NUM_ITEMS)

    def saying(token_N: Tensor) -> RoutingContext:
        return RoutingContext(state={"token_N": token_N})

    context = saying(token_N)
    logit_NE = score.project(x_ND, context)
    expect(score.hands_on or not context.carry, "project leaves something in context.carry, but hands_on is False")
    expect(logit_NE.shape == (NUM_ITEMS, num_destinations), f"logits have shape {list(logit_NE.shape)}, not [N, E]")
    expect(logit_NE.dtype == torch.float32, f"logits of fp32 items are {logit_NE.dtype}")
    expect(
        score.project(x_ND[:0], saying(token_N[:0])).shape == (0, num_destinations), "no items do not give no logits"
    )
    order_N = torch.randperm(NUM_ITEMS, generator=generator)
    if score.is_causal:
        expect_close(score.project(x_ND[order_N], saying(order_N)), logit_NE[order_N], "logits of permuted items")
    with torch.autocast("cpu", torch.bfloat16):
        expect_close(score.project(x_ND, saying(token_N)), logit_NE, "logits under autocast (they must stay fp32)")
        expect(
            score.project(x_ND.bfloat16(), saying(token_N)).dtype == torch.float32, "logits of bf16 items are not fp32"
        )
    score_NE = score.activate(logit_NE)
    expect((score_NE >= 0).all() and torch.isfinite(score_NE).all(), "a score is negative or not finite")
    closed_NE = logit_NE.masked_fill(torch.arange(num_destinations) == 1, -torch.inf)
    expect((score.activate(closed_NE)[:, 1] == 0).all(), "a logit of minus infinity does not score 0")
    # Vectors that others put in learn nothing: no parameter of such a score does.
    if not real or any(parameter.requires_grad for parameter in score.parameters()):
        if real:
            (score_NE * torch.randn(NUM_ITEMS, num_destinations, generator=generator)).sum().backward()
        check_has_gradients(score)
    check_copies(score, lambda module: module.project(x_ND, saying(token_N)))


def check_select(config: Select.Config, *, num_destinations: int = 16) -> None:
    """The contract of the family ``select``."""
    check_config(config)
    select: Select = config.build(num_destinations)
    generator = torch.Generator().manual_seed(0)
    logit_NE = torch.randn(NUM_ITEMS, num_destinations, generator=generator, requires_grad=True)
    score_NE = logit_NE.softmax(-1)
    routing = select(score_NE, logit_NE=logit_NE)
    check_routing(routing)
    expect(routing.used_NK.any(), "nothing was chosen")
    told = (None, routing.num_choices)
    expect(select.num_choices in told, f"num_choices is {select.num_choices}, but there are {routing.num_choices}")
    most, exact = config.most_choices(num_destinations), config.exact_choices
    expect(most == select.num_choices, f"the config's most_choices is {most}, but num_choices is {select.num_choices}")
    used = f"exact_choices is {exact}, but items use {routing.used_NK.sum(1).unique().tolist()} choices"
    expect(exact is None or bool((routing.used_NK.sum(1) == exact).all()), used)
    expect(torch.equal(select(score_NE, logit_NE=logit_NE).index_NK, routing.index_NK), "two calls choose differently")
    routing.weight_NK.square().sum().backward()
    expect(torch.isfinite(logit_NE.grad).all(), "a gradient is not finite")  # type: ignore[arg-type]
    check_routing(select(score_NE[:0]))
    order_N = torch.randperm(NUM_ITEMS, generator=generator)
    permuted = select(score_NE[order_N], logit_NE=logit_NE[order_N])
    expect(torch.equal(permuted.index_NK, routing.index_NK[order_N]), "permuting items does not permute choices")
    for open_NE in (
        torch.arange(num_destinations) % 3 > 0,
        torch.rand(NUM_ITEMS, num_destinations, generator=generator) < 0.4,
        torch.zeros(NUM_ITEMS, 1, dtype=torch.bool),
    ):
        bias_E = torch.randn(num_destinations, generator=generator) * 100
        limited = select(score_NE, logit_NE=logit_NE, bias_E=bias_E, open_NE=open_NE)
        check_routing(limited)
        chosen_NK = open_NE.expand_as(score_NE).gather(1, limited.index_NK.clamp_min(0))
        expect(chosen_NK[limited.used_NK].all(), "a closed destination was chosen")
    if select.is_causal:  # an item's choice is its own
        expect(torch.equal(select(score_NE[:1]).index_NK, routing.index_NK[:1]), "a choice depends on other items")


def check_balancer(config: Balancer.Config, *, num_destinations: int = 16) -> None:
    """The contract of the family ``balance``."""
    check_config(config)
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
            expect(loss.dim() == 0 and torch.isfinite(loss), f"loss {name} is {loss}, not one finite number")
            if not seen.routing.used_NK.any():
                expect(loss == 0, f"loss {name} is {loss} where there are no items")
        if losses:
            sum(losses.values()).backward()  # type: ignore[union-attr]
            gradient_NE = logit_NE.grad
            expect(gradient_NE is not None and torch.isfinite(gradient_NE).all(), "a gradient is missing or not finite")
            if item_mask_N is not None:
                expect((gradient_NE[~item_mask_N] == 0).all(), "padding has a gradient")  # type: ignore[index]
            if open_NE is not None:
                expect((gradient_NE[:, ~open_E] == 0).all(), "a closed destination has a gradient")  # type: ignore[index]
    hooks = StepHooks(balancer, 3)
    for step in range(3):
        hooks.run_after(step)
    bias_E = balancer.bias_E
    if bias_E is not None:
        expect(bias_E.shape == (num_destinations,) and torch.isfinite(bias_E).all(), "bias_E is not [E] and finite")
        expect(bias_E.dtype == torch.float32 and not bias_E.requires_grad, "bias_E must be fp32 and without gradient")
        cast_E = copy.deepcopy(balancer).bfloat16().bias_E
        expect(cast_E is not None and cast_E.dtype == torch.float32, "a model that is cast to bf16 casts its bias")
    twin = config.build(num_destinations)
    twin.load_state_dict(balancer.state_dict())
    check_same_state(twin, balancer, "loaded from a state dict")


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
    expect(not quiet.losses and not quiet.loads and not quiet.parts, "a balancer emits outside training")
    if router.select.is_causal and router.score.is_causal:
        order_N = torch.randperm(NUM_ITEMS, generator=generator).to(device)
        permuted = router(x_ND[order_N], RoutingContext())
        expect(torch.equal(permuted.index_NK, routing.index_NK[order_N]), "permuting items does not permute choices")
        expect_close(permuted.weight_NK, routing.weight_NK[order_N], "weights of permuted items")
    padded = router(x_ND, RoutingContext(item_mask_N=mask_N))
    check_routing(padded)
    expect((padded.index_NK[~mask_N] == UNUSED).all(), "a padding item is routed")
    _check_overrides(router, x_ND, mask_N)
    context = RoutingContext(training=True, sequence_length=4, item_mask_N=mask_N)
    routing = router(x_ND, context)
    context.commit()
    for module in router.modules():
        if isinstance(module, LoadCounter) and module.load_E.any():
            expect(
                torch.equal(module.load_E, routing.load_E().float()), "a balancer counts other loads than the routing's"
            )
    losses = context.mean_losses()
    (routing.weight_NK.square().sum() + sum(losses.values())).backward()
    check_has_gradients(router)
    check_copies(router, lambda module: module(x_ND, RoutingContext()).weight_NK)


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
        expect(not (context.losses or context.loads or context.parts), "a balancer sees overridden decisions")
        return routing

    routing = run(open_NE=~closed_E)
    chosen_NK = closed_E.to(x_ND.device)[routing.index_NK.clamp_min(0)] & routing.used_NK
    expect(not chosen_NK.any(), "a destination that an override closes was chosen")
    run(bias_NE=torch.linspace(-100, 100, num_destinations))
    run(logit_NE=torch.linspace(-100, 100, num_destinations))
    for changes in ({}, {"weight_NK": torch.full((NUM_ITEMS, 1), 0.5)}):
        routing = run(index_NK=index_NK, **changes)
        expected_NK = index_NK.to(x_ND.device).masked_fill(~mask_N.unsqueeze(-1), UNUSED)
        expect(torch.equal(routing.index_NK, expected_NK), "a forced destination was not taken")
