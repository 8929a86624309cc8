"""All of FTP in one call: search a schedule with the static router, let the router learn under it, search on with the router."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from anabranch.config import Config, Field, configclass, to_dict
from anabranch.depth.ftp.features import FactorConfig
from anabranch.depth.ftp.items import items_of
from anabranch.depth.ftp.memo import FitMemo, digest_of
from anabranch.depth.ftp.passes import Kept
from anabranch.depth.ftp.router import Mode, RouterConfig, TokenRouter
from anabranch.depth.ftp.schedule import ScheduleConfig, ScheduleSpace, Searched
from anabranch.depth.ftp.search import Objective, finetune_schedule, search_schedule
from anabranch.depth.ftp.skipper import TokenSkipper
from anabranch.depth.ftp.training import TrainingConfig, train_router
from anabranch.depth.genetic import Generation
from anabranch.depth.stack import stack_of

__all__ = ["FitConfig", "Fitted", "fit_skipper"]


@configclass
class FitConfig(Config):
    """How a skipper is fitted.

    Attributes:
        schedule: the searches.
        training: of the router.
        router: what decides: ``learned``, or ``static``, where the first search is all.
        inputs: what the router that learns looks at, see `RouterConfig`.
        factors: constants of the factors.
        objective: what searches make small: ``nll`` of continuations, or ``kl`` of next tokens from the dense model's.
        mode, kv, one_pass: as of `TokenSkipper`; the router learns by the greater score whatever ``mode`` is.
        rounds: how often the router learns and its schedule is searched on (the paper: once).
        calibration: items on which schedules are measured, the first ones; the router learns from all.
    """

    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    router: Literal["learned", "static"] = "learned"
    inputs: Literal["factors", "hidden", "both"] = "factors"
    factors: FactorConfig = FactorConfig()
    objective: Objective = "nll"
    mode: Mode = "topk"
    kv: Kept = "drop"
    one_pass: bool = False
    rounds: int = Field(default=1, ge=1, le=100)
    calibration: int = Field(default=40, ge=1)


@dataclass(frozen=True)
class Fitted:
    """What a fit made.

    Attributes:
        skipper: ready to use.
        searched: of step 1.
        tuned: of step 3, one for each round.
        history: losses of each step of learning, of the last round.
    """

    skipper: TokenSkipper
    searched: Searched
    tuned: list[Searched] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def evaluations(self) -> int:
        """Schedules that were measured."""
        return self.searched.evaluations + sum(one.evaluations for one in self.tuned)


def fit_skipper(
    model: Any,
    items: Sequence[Any],
    sparsity: float,
    config: FitConfig | None = None,
    *,
    seed: int = 0,
    unfinished: str | Path | None = None,
    on_generation: Callable[[str, Generation], None] | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> Fitted:
    """A skipper of tokens for a model, fitted on prompts with what comes after them.

    Args:
        model: or its stack; nothing in it changes.
        items: `Item`, or pairs of (prompt, continuation) ids.
        sparsity: S, the mean share of a prompt's tokens that blocks pass over, in [0, s_max).
        config: how it is fitted.
        seed: of searches, weights and order.
        unfinished: a file that keeps what was measured, with which a stopped fit goes on; it is removed at the end.
        on_generation: told the stage (``search``, ``tune``) and each of its generations, whose fitness is minus the loss.
        on_step: told of each step of learning.

    Raises ConfigError (a ValueError) for a sparsity that cannot be, DataError for no items or an ``unfinished`` of another fit.
    """
    stack, config = stack_of(model), config or FitConfig()
    first = config.schedule if config.router == "static" else config.schedule.replace(first_dense=True)
    # What cannot be is refused before anything is written.
    ScheduleSpace.of(sparsity, stack.num_blocks, first)
    learned = items_of(items, stack)
    measured = learned[: config.calibration]
    about = [
        stack.fingerprint(),
        sparsity,
        seed,
        to_dict(config),
        [[*item.prompt, -1, *item.continuation] for item in learned],
    ]
    memo = FitMemo(unfinished, digest_of(about))

    def told(stage: str) -> Callable[[Generation], None]:
        return lambda generation: None if on_generation is None else on_generation(stage, generation)

    options: dict[str, Any] = {"objective": config.objective, "seed": seed}
    searched = search_schedule(
        stack,
        measured,
        sparsity,
        config=first,
        kv=config.kv,
        memo=memo.losses("search"),
        on_generation=told("search"),
        **options,
    )
    skipper = TokenSkipper(stack, searched.schedule, kv=config.kv)
    tuned: list[Searched] = []
    history: list[dict[str, float]] = []
    for number in range(config.rounds if config.router == "learned" else 0):
        router = TokenRouter(_router(config, stack.width), seed=seed).to(stack.device)
        if isinstance(skipper.router, TokenRouter):
            router.load_state_dict(skipper.router.state_dict())
        if not memo.router(f"round {number}", router):
            router, history = train_router(
                stack,
                learned,
                skipper.schedule,
                router=router,
                config=config.training,
                factors=config.factors,
                one_pass=config.one_pass,
                kv=config.kv,
                seed=seed + number,
                on_step=on_step,
            )
            memo.keep_router(f"round {number}", router)
        router.requires_grad_(False)
        skipper = TokenSkipper(
            stack,
            skipper.schedule,
            router,
            mode=config.mode,
            kv=config.kv,
            one_pass=config.one_pass,
            factors=config.factors,
        )
        found = finetune_schedule(
            skipper,
            measured,
            config=config.schedule,
            memo=memo.losses(f"tune {number}"),
            on_generation=told("tune"),
            **options,
        )
        tuned.append(found)
        skipper = skipper.with_schedule(found.schedule)
    memo.remove()
    return Fitted(skipper, searched, tuned, history)


def _router(config: FitConfig, width: int) -> RouterConfig:
    return RouterConfig(inputs=config.inputs, dim=None if config.inputs == "factors" else width)
