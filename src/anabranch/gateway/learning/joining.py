"""A model of the config joins the fitted routers that the gateway serves, and what these have learned since goes on with it.

    the fitted file     -> read, joined, written in one step      (`anabranch.routers.joining`)
    what was learned    -> under the new file's mark: what adds up as it is, the newest state of the rest with the model joined
    the gateway         -> reads its config again, finds another file, and goes on from what was learned

Rows of what was learned are found by what a strategy was made from, so a changed file would begin anew without the second step.
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from anabranch.errors import AnabranchError, InputError
from anabranch.gateway.config import GatewayConfig
from anabranch.gateway.config.prices import model_price
from anabranch.gateway.decide import load_router
from anabranch.gateway.lane import made_of
from anabranch.gateway.learning.kept import Kept
from anabranch.gateway.learning.kept_bytes import packed_part, read_part
from anabranch.gateway.learning.services import LearningServices
from anabranch.gateway.logged_error import plain, words
from anabranch.gateway.store import Store, learned
from anabranch.gateway.store.learned import NOBODY, LearnedRow
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Model
from anabranch.routers.contract.strategy import Strategy
from anabranch.routers.fitted import ENDING, FittedRouter, load_folder
from anabranch.routers.joining import joined, outcomes_of, save_joined
from anabranch.routers.money import Price
from anabranch.routers.recommendation import no_recommendation, pick
from anabranch.web.turns import in_thread

logger = logging.getLogger(__name__)

# Of `Store.alone`.
WORK = "join"


@dataclass(frozen=True, kw_only=True)
class Joined:
    """What came of it.

    Attributes:
        strategies: of the config, whose routers know the model now.
        refused: why others do not, by name.
        files: that were written.
    """

    strategies: tuple[str, ...]
    refused: dict[str, str]
    files: tuple[str, ...]


def file_of(place: str, name: str) -> Path:
    """The file of the router that a strategy of this name serves."""
    path = Path(place)
    if path.is_file():
        return path
    picked = pick(place, name)
    if picked is None:
        raise InputError(
            f"it serves none of the routers in {place}: none has its name, and {no_recommendation(place, 'anabranch gateway')}"
        )
    if picked.choice is not None and picked.choice.kind == "model":
        raise InputError(
            f"it serves no router: {picked.why}, so that {picked.name} is always asked; name the strategy as a router of {place} "
            f"({', '.join(load_folder(place).routers)}) to serve that one"
        )
    return path / f"{picked.name}{ENDING}"


async def join_served(
    services: LearningServices,
    kept: Kept,
    name: str,
    *,
    strategies: Sequence[str] = (),
    outcomes: Recorded | None = None,
) -> Joined:
    """`join` where strategies are at work: what they have learned is handed over, and nothing is written of it meanwhile.

    Args:
        services: of the gateway.
        kept: what its strategies have stored.
        name, strategies, outcomes: see `join`, which says what is raised.
    """
    lanes = [
        lane
        for lane in services.lanes.values()
        if lane.settings.router is not None and (not strategies or lane.name in strategies)
    ]
    async with kept.handed_over(lanes) as over:
        done = await join(services.store, services.config, name, strategies=strategies, outcomes=outcomes)
        over.update(done.strategies)
    return done


async def join(
    store: Store | None,
    config: GatewayConfig,
    name: str,
    *,
    strategies: Sequence[str] = (),
    outcomes: Recorded | None = None,
) -> Joined:
    """Let a model join. Whoever serves the config reads it again afterwards.

    Args:
        store: where what strategies learned is kept; None if there is none yet.
        config: that has the model.
        name: of it.
        strategies: by their names; empty for all that serve fitted routers.
        outcomes: that hold a column of it.

    A strategy whose router cannot be read, does not take it, or cannot be written is among ``refused``, and keeps no other from it.

    Raises InputError for a model or a strategy that the config does not have, outcomes without it, or where no router takes it.
    """
    model = _model(config, name)
    fitted = {one: settings.router for one, settings in config.strategies.items() if settings.router is not None}
    if unknown := [one for one in strategies if one not in fitted]:
        has = f"those that do are {', '.join(fitted)}" if fitted else "none does"
        raise InputError(f"{unknown[0]!r} is no strategy that serves a fitted router; {has}")
    if not fitted:
        raise InputError("no strategy of the config serves a fitted router; set router of one")
    if outcomes is not None:
        await in_thread(outcomes_of, outcomes, name)
    async with nullcontext(True) if store is None else store.alone_beside(WORK) as is_alone:
        if not is_alone:
            raise InputError("another model is joining; try again")
        return await _join(store, config, model, strategies or tuple(fitted), outcomes)


async def _join(
    store: Store | None, config: GatewayConfig, model: Model, names: Sequence[str], outcomes: Recorded | None
) -> Joined:
    refused: dict[str, str] = {}
    before: dict[str, tuple[FittedRouter, str]] = {}
    files: dict[Path, FittedRouter] = {}
    paths: dict[str, Path] = {}
    # All of them before the first is written.
    for one in names:
        try:
            served = await in_thread(_served, config, one)
            path = await in_thread(file_of, str(config.strategies[one].router), one)
            if path not in files:
                files[path] = await in_thread(lambda: joined(FittedRouter.load(path), model, outcomes))  # noqa: B023
        except Exception as error:
            refused[one] = _told(one, model, error)
        else:
            before[one], paths[one] = served, path
    for path, router in files.items():
        try:
            await in_thread(save_joined, router, path)
        except Exception as error:
            for one in [one for one, its in paths.items() if its == path]:
                del paths[one]
                refused[one] = _told(one, model, error)
    if not paths:
        raise InputError("; ".join(f"strategy {one}: {why}" for one, why in refused.items()))
    for one in paths:
        if store is None:
            break
        try:
            await _carry_over(store, config, one, before[one], model, outcomes)
        except Exception as error:
            logger.warning(
                "strategy %s knows %s now, and what it learned is left behind: %s",
                one,
                model.name,
                words(error),
                exc_info=error,
            )
    written = tuple(str(path) for path in files if path in paths.values())
    return Joined(strategies=tuple(paths), refused=refused, files=written)


def _told(name: str, model: Model, error: Exception) -> str:
    """Why a strategy does not know the model, whoever wrote it; the log has it too."""
    raised = plain(error)
    is_ours = isinstance(raised, AnabranchError | OSError)
    logger.warning(
        "model %s does not join strategy %s: %s", model.name, name, words(raised), exc_info=None if is_ours else raised
    )
    return words(raised) if is_ours else f"{type(raised).__name__}: {words(raised)}"


def _model(config: GatewayConfig, name: str) -> Model:
    """As routers know it."""
    found = next((one for one in config.models if one.name == name), None)
    if found is None:
        raise InputError(
            f"there is no model {name!r} in the config; add it, have the gateway read that, and let it join then (it has "
            f"{', '.join(one.name for one in config.models)})"
        )
    return Model(
        name=name,
        price=model_price(found) or Price(),
        parameters=found.parameters,
        description=found.description,
        context=found.context,
    )


def _served(config: GatewayConfig, name: str) -> tuple[FittedRouter, str]:
    """What a strategy serves now, and the mark of what it learns; "" if that is not kept."""
    embedder = None if config.embedder is None else config.embedder.build()
    strategy, own = load_router(name, config.strategies[name], embedder, [one.name for one in config.models])
    router = FittedRouter(strategy=strategy, models=(), embedder=own)
    return router, made_of(name, strategy, own) if strategy.learns else ""


async def _carry_over(
    store: Store,
    config: GatewayConfig,
    name: str,
    before: tuple[FittedRouter, str],
    model: Model,
    outcomes: Recorded | None,
) -> None:
    """Put what was learned under the mark of the new file."""
    (old, made), (_, new_made) = before, await in_thread(_served, config, name)
    if not made or not new_made or made == new_made:
        return
    if old.strategy.adds_up:
        # Sums of the others' scores are what they were.
        await store.change(lambda connection: learned.move_learned(connection, name, made, new_made))
        return
    rows = await store.look(lambda connection: learned.read_learned(connection, name, made))
    for row in reversed(rows):
        try:
            body = await in_thread(_with_model, old, row.body, model, outcomes, name)
        except Exception as error:
            logger.warning("what strategy %s learned (row of %s) is left behind: %s", name, row.writer, words(error))
            continue
        new = LearnedRow(
            strategy=name, made=new_made, writer=NOBODY, kind=row.kind, version=1, ts_us=store.now_us(), body=body
        )
        await store.change(lambda connection: learned.put_learned(connection, new, None))  # noqa: B023
        return


def _with_model(router: FittedRouter, body: bytes, model: Model, outcomes: Recorded | None, name: str) -> bytes:
    """A state with the model joined, as the store keeps it."""
    strategy: Strategy = router.strategy
    strategy.load_kept(*read_part(body, name))
    joined(router, model, outcomes)
    return packed_part(strategy.kept_state(), name)
