"""Stages 1 and 3: training the duo model, and a router for it that knows no labels.

    P_l = softmax(W_l h / tau)      L = L_CE + alpha (mean_l P_l,big - budget)^2      (Duo-LLM, section 3)

In training a layer's output is the mixture sum_x P_l,x FFN_x(h), with tau falling from 1 to 0.1; afterwards each token takes the argmax.
"""
# Shapes: B sequences, L positions, Y duo layers, E options

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anabranch.depth.duo_llm.labels import RouteLabels
from anabranch.depth.duo_llm.layer import BIG, SKIP, SMALL, DuoFFN, duo_layers
from anabranch.depth.duo_llm.parts import BudgetLoss, Mixture, TemperedScore
from anabranch.depth.duo_llm.results import evaluating
from anabranch.depth.duo_llm.supervised import ROUTERS, LabelledRoutes
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.recipes import Material, not_chosen, recipe
from anabranch.routing import Router, record_routing
from anabranch.train import Event, RunConfig, TaskRunConfig, Trainer

logger = logging.getLogger(__name__)

OnEvent = Callable[[Event], None]


def learned_router(budget: float = 0.5, *, alpha: float = 1.0, skip: float | None = None) -> Router.Config:
    """The router of stage 3.

    Args:
        budget: share of big, over layers and tokens.
        alpha: weight of the budget loss.
        skip: share of skip, for a model that allows it; then every option is held to its share (sum of squared deviations).

    Raises ConfigError for shares that exceed 1.
    """
    targets = {BIG: budget}
    if skip is not None:
        if budget + skip > 1:
            raise ConfigError(f"budget + skip is {budget + skip}; it must be at most 1")
        targets = {SMALL: 1 - budget - skip, BIG: budget, SKIP: skip}
    balance = tuple(
        BudgetLoss.Config(destination=option, budget=share, alpha=alpha) for option, share in targets.items()
    )
    return Router.Config(score=TemperedScore.Config(), select=Mixture.Config(), balance=balance)


def with_router(model: Decoder, router: Router.Config | None = None, *, seed: int = 0, freeze: bool = True) -> Decoder:
    """A copy of a duo model with a learned router in every duo layer (default `learned_router`); ``freeze`` leaves only routers to train.

    Raises ConfigError for a model without duo layers.
    """
    duo_layers(model)
    config = model.config.replace(feed_forward=model.config.feed_forward.replace(router=router or learned_router()))
    made: Decoder = config.build(seed=seed).to(model.embedding.weight)
    state = made.state_dict()
    made.load_state_dict({**state, **{name: value for name, value in model.state_dict().items() if name in state}})
    if freeze:
        freeze_all_but(made, ROUTERS)
    return made.train(model.training)


def freeze_all_but(model: nn.Module, part: str) -> None:
    """Let only parameters train whose name contains ``part``."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)


def train_duo(
    run: RunConfig,
    out: str | Path,
    *,
    recipe: Literal["joint", "freeze_big"] = "joint",
    resume: bool = False,
    on_event: OnEvent | None = None,
) -> Decoder:
    """Stage 1: train both modules.

    Args:
        run: a run whose model has duo layers.
        out: its folder.
        recipe: ``joint``, random routing (the paper's); or ``freeze_big``, the alternative that the paper finds clearly worse: half of
            the steps train everything but the small modules, the other half the small modules alone.
        resume: go on in ``out`` where it was stopped.
        on_event: as of `Trainer`.

    Returns the trained model. Raises KeyboardInterrupt if training was interrupted; its checkpoint is in ``out``.
    """
    _check_duo(run)
    if recipe == "joint":
        return _fit(run, Path(out), None, resume, on_event)
    if recipe != "freeze_big":
        raise ConfigError(f"recipe is {recipe!r}; use joint or freeze_big")
    first_steps = run.train.steps // 2
    big = _stage(run, p_big=1.0, steps=first_steps)
    model = _fit(big, Path(out) / "big", None, resume, on_event)
    small = _stage(run, p_big=0.0, steps=run.train.steps - first_steps)
    second: Decoder = small.model.build()
    second.load_state_dict(model.state_dict())
    freeze_all_but(second, ".small.")
    trained = _fit(small, Path(out) / "small", second, resume, on_event)
    result: Decoder = run.model.build()
    result.load_state_dict(trained.state_dict())
    return result


def train_router(
    model: Decoder,
    run: RunConfig,
    out: str | Path,
    *,
    router: Router.Config | None = None,
    supervision: Literal["budget", "oracle"] = "budget",
    labels: RouteLabels | None = None,
    resume: bool = False,
    on_event: OnEvent | None = None,
) -> Decoder:
    """Stage 3: train a router on a frozen duo model.

    Args:
        model: a trained duo model; it is copied.
        run: data and settings; its model is replaced, and so is its data where there are labels.
        out: folder of the run.
        router: default `learned_router`.
        supervision: ``budget``, cross-entropy and the budget loss (the paper's); ``oracle``, focal loss on ``labels``, with the labelled
            route executed so that each router sees the states its label leads to.
        labels: routes that an oracle chose.
        resume: go on in ``out``.
        on_event: as of `Trainer`.

    Returns a model with a router. Its share of big follows the budget loosely: see `calibrate_budget`.
    """
    routed = with_router(model, router, seed=run.train.seed)
    if supervision == "budget":
        return _fit(run.replace(model=routed.config), Path(out), routed, resume, on_event)
    if supervision != "oracle":
        raise ConfigError(f"supervision is {supervision!r}; use budget or oracle")
    if labels is None:
        raise ConfigError("supervision='oracle' needs labels; make them with RouteLabels.of(ids_BL, oracle_result)")
    task = TaskRunConfig(task=LabelledRoutes.Config(model=routed.config), train=run.train)
    return _fit(task, Path(out), routed, resume, on_event, labels=labels)


def option_shares(model: Decoder, token_BL: Tensor, *, chunk: int = 16) -> Tensor:
    """share_YE: how often each layer of a model with a learned router takes each option, in evaluation."""
    with evaluating(model), record_routing(model) as recorder:
        for start in range(0, token_BL.shape[0], chunk):
            model(token_BL[start : start + chunk])
    load_YE = torch.from_numpy(recorder.trace().load_LE()).double()
    return load_YE / load_YE.sum(1, keepdim=True)


def calibrate_budget(
    model: Decoder, token_BL: Tensor, budget: float, *, tolerance: float = 0.005, chunk: int = 16
) -> float:
    """Shift the big logit of all layers alike until the measured share of big is ``budget``, within ``tolerance``. Returns the share.

    Where no shift comes as close (the router cannot tell tokens apart, so too many change over at once) the nearest is kept and a
    warning is logged.

    Raises ConfigError for a model without a learned router, or a budget outside 0 to 1.
    """
    scores = [layer.router.score for layer in duo_layers(model)]
    if not all(isinstance(score, TemperedScore) for score in scores):
        raise ConfigError(
            "calibrate_budget needs a learned router with a 'tempered' score; make one with with_router(model)"
        )
    if not 0 <= budget <= 1:
        raise ConfigError(f"budget is {budget}; it is a share, use 0 to 1")

    def measured(shift: float) -> float:
        for score in scores:
            score.shift_E[BIG] = shift  # type: ignore[operator]
        return float(option_shares(model, token_BL, chunk=chunk)[:, BIG].mean())

    low, high = -1.0, 1.0
    while measured(low) > budget + tolerance and low > -(2**20):
        low *= 2
    while measured(high) < budget - tolerance and high < 2**20:
        high *= 2
    tried: dict[float, float] = {}  # shift -> share
    for _ in range(40):
        middle = (low + high) / 2
        tried[middle] = measured(middle)
        if abs(tried[middle] - budget) <= tolerance:
            return tried[middle]
        low, high = (middle, high) if tried[middle] < budget else (low, middle)
    nearest = min(tried, key=lambda shift: abs(tried[shift] - budget))
    logger.warning("no shift of the router gives a share of big of %s; the nearest is %.4f", budget, tried[nearest])
    return measured(nearest)


def _fit(
    run: RunConfig | TaskRunConfig,
    out: Path,
    model: Decoder | None,
    resume: bool,
    on_event: OnEvent | None,
    **given: Any,
) -> Decoder:
    has_run = resume and out.is_dir() and any(out.iterdir())
    trainer = Trainer(run, out, resume=has_run, on_event=on_event, model=model, **given)
    if trainer.fit().status != "finished":
        raise KeyboardInterrupt
    trained: Decoder = trainer.model
    return trained


def _stage(run: RunConfig, *, p_big: float, steps: int) -> RunConfig:
    feed_forward: Any = run.model.feed_forward
    model = run.model.replace(feed_forward=feed_forward.replace(p_big=p_big, p_skip=0.0))
    return run.replace(model=model, train=run.train.replace(steps=steps))


def _check_duo(run: RunConfig) -> None:
    if not isinstance(run.model.feed_forward, DuoFFN.Config):
        raise ConfigError(f"train_duo needs a 'duo' feed-forward, the run has {run.model.feed_forward.owner.kind!r}")


not_chosen(DuoFFN.Config, "big", "small", "activation")


def _is_without_routers(config: Decoder.Config, p_big: float) -> bool:
    layer = config.feed_forward
    return isinstance(layer, DuoFFN.Config) and layer.router is None and layer.p_big == p_big


@recipe(
    "train_small",
    makes=lambda config: _is_without_routers(config, 0.0),
    takes=lambda config: _is_without_routers(config, 1.0),
    needs="a 'duo' model whose big modules were trained alone (p_big=1)",
    learns=".small.",
)
def _small_alone(model: Decoder, config: Decoder.Config, material: Material) -> Decoder:
    """The second half of ``freeze_big``, see `train_duo`."""
    layer: Any = model.config.feed_forward
    made: Decoder = model.config.replace(feed_forward=layer.replace(p_big=0.0)).build().to(model.embedding.weight)
    made.load_state_dict(model.state_dict())
    return made.train(model.training)


def _router_of(config: Decoder.Config) -> Router.Config | None:
    layer = config.feed_forward
    return layer.router if isinstance(layer, DuoFFN.Config) else None


@recipe(
    "with_router",
    makes=lambda config: _router_of(config) is not None,
    takes=lambda config: isinstance(config.feed_forward, DuoFFN.Config) and _router_of(config) is None,
    needs="a trained 'duo' model without routers",
    learns=ROUTERS,
)
def _with_routers(model: Decoder, config: Decoder.Config, material: Material) -> Decoder:
    return with_router(model, _router_of(config), seed=material.seed)
