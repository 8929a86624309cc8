"""What an evaluation recommends of a folder of fitted routers, kept beside them and used where no router is named.

    DIR/recommended.json     a router of the folder at a setting of its knob, or a single model; why; on what it was judged

Where routers are fitted anew it stays, as judged before they were, if what it recommends is still there (see `fitted.save_folder`).
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from anabranch.errors import CheckpointError
from anabranch.files import atomic_write_json, parse_json
from anabranch.routers.embed import embed_of
from anabranch.routers.fitted import RECOMMENDED, FittedRouter, load_folder
from anabranch.routers.referee.verdict import Choice, Verdict, shown
from anabranch.routers.strategies.fixed import Static

VERSION = 1
MOST_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Picked:
    """A router of a folder, and why it is this one.

    Attributes:
        name: of the router, or of the single model that is asked always.
        router: it.
        choice: the recommendation; None where the router was named or is the only one.
        why: in words.
    """

    name: str
    router: FittedRouter
    choice: Choice | None
    why: str


def keep_recommendation(folder: str | Path, verdict: Verdict) -> None:
    """Write what is recommended into the folder of the routers that were judged, whole or not at all.

    Raises DataError or CapacityError if it cannot be written.
    """
    assert verdict.recommended is not None
    content = {
        "version": VERSION,
        "recommended": asdict(verdict.recommended),
        "questions": verdict.questions,
        "best_single": verdict.best_single,
        "sentences": verdict.sentences(),
    }
    atomic_write_json(Path(folder) / RECOMMENDED, content)


def read_recommendation(folder: str | Path) -> Choice | None:
    """What is recommended of the routers in a folder; None if nothing is, or it is a single file.

    Raises CheckpointError for a file that is damaged or of another version.
    """
    path = Path(folder) / RECOMMENDED
    if not Path(folder).is_dir() or not path.is_file():
        return None
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError("it is too large")
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; delete it, or run eval again") from None
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise CheckpointError(f"{path} is not of version {VERSION}, which this version reads; run eval again")
    match content.get("recommended"):
        case {
            "kind": "strategy" | "model" as kind,
            "name": str(name),
            "setting": None | int() | float() as setting,
            "reason": str(reason),
        }:
            if content.get("is_refitted"):
                reason = f"{reason} (judged before the routers were fitted anew; eval judges again)"
            return Choice(kind=kind, name=name, setting=setting, reason=reason)
    raise CheckpointError(f"{path} names nothing that is recommended; delete it, or run eval again")


def pick(place: str | Path, name: str | None = None) -> Picked | None:
    """The router of this name in a folder, else the recommended one, else the only one; None if that leaves several.

    Raises CheckpointError for a folder or a file that cannot be used.
    """
    held = load_folder(place)
    if name in held.routers:
        return Picked(name=str(name), router=held.routers[str(name)], choice=None, why="it was named")
    choice = read_recommendation(place)
    if choice is None:
        if len(held.routers) != 1:
            return None
        only = next(iter(held.routers))
        return Picked(name=only, router=held.routers[only], choice=None, why=f"{place} holds no other")
    why = f"eval recommends {shown(choice)}, since {choice.reason}"
    if choice.kind == "model":
        models = next(iter(held.routers.values())).models
        if choice.name not in [model.name for model in models]:
            raise CheckpointError(
                f"{Path(place) / RECOMMENDED} recommends {choice.name!r}, a model that its routers do not know"
            )
        router = FittedRouter(strategy=Static(Static.Config(model=choice.name)), models=models)
        return Picked(name=choice.name, router=router, choice=choice, why=why)
    if choice.name not in held.routers:
        raise CheckpointError(
            f"{Path(place) / RECOMMENDED} recommends {choice.name!r}, a router that is not in the folder"
        )
    return Picked(name=choice.name, router=_at(held.routers[choice.name], choice.setting), choice=choice, why=why)


def _at(router: FittedRouter, setting: float | None) -> FittedRouter:
    """A router with its knob at this setting."""
    if setting is None:
        return router
    try:
        strategy = router.strategy.with_knob(setting)
    except NotImplementedError:
        raise CheckpointError(f"{router.strategy.name} has no knob that could be at {setting:g}") from None
    strategy.connect(embed=embed_of(router.embedder))
    return replace(router, strategy=strategy)


def no_recommendation(place: str | Path, door: str = "anabranch routers") -> str:
    """What to do where several routers are there and none is recommended, by which command."""
    return f"no router of {place} is recommended yet ({door} eval DATA --router {place} recommends one)"
