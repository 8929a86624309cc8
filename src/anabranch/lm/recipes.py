"""From the weights of one model to another design: each design says how it starts from a trained model.

    started = start_from(model, config, seed=0, sample=lambda: token_BL)     # the first recipe that leads to the design of config

A design registers its own with `recipe`, beside the class whose config asks for it, so that it is there once such a config is.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from anabranch.config import Config, to_dict
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.differences import Difference, differences, shown
from anabranch.lm.upcycle import upcycle
from anabranch.nn import FeedForward, MoE, SwiGLU
from anabranch.routing import LinearScore, Router

__all__ = ["Material", "Started", "fields_beyond", "kept_fields", "not_chosen", "recipe", "start_from"]


@dataclass(frozen=True)
class Material:
    """What a recipe may take beside the model.

    Attributes:
        seed: of what it draws.
        sample: gives int64 ``[B, L]``, some hundreds of tokens of the training text.
    """

    seed: int
    sample: Callable[[], Tensor]


Fits = Callable[[Decoder.Config, Decoder.Config], bool]
Convert = Callable[[Decoder, Decoder.Config, Material], Decoder]


@dataclass(frozen=True)
class _Recipe:
    name: str
    needs: str
    makes: Callable[[Decoder.Config], bool]
    takes: Callable[[Decoder.Config], bool]
    convert: Convert
    learns: str | None
    keeps: tuple[str, ...]
    sets: tuple[str, ...]


@dataclass(frozen=True)
class Started:
    """What `start_from` made.

    Attributes:
        model: the new model; its config says its shape.
        recipe: names of the recipes, in the order in which they were used; empty where the design is that of the model already.
        learns: only parameters whose name contains this are meant to learn; None for all.
    """

    model: Decoder
    recipe: tuple[str, ...]
    learns: str | None = None


_RECIPES: dict[str, _Recipe] = {}
# Fields that are the trained model's or the recipe's, whatever the wanted design says.
_NOT_CHOSEN: dict[type[Config], tuple[str, ...]] = {}
_LAYER = "model.feed_forward"
# Sizes are the trained model's, and what weights are drawn from says nothing about weights that are there.
_SIZES = ("num_experts", "hidden_dim", "shared_hidden_dim")
_INITIAL = ("router.score.init", "router.score.init_std")
# These say how to train and compute, not what the weights mean: they are the wanted design's.
_OF_ROUTER = ("balance", "check_finite")
_OF_LAYER = ("capacity_factor", "capacity_order", "capacity_renormalize", "recompute", "backend")


def recipe(
    name: str,
    *,
    makes: Callable[[Decoder.Config], bool],
    takes: Callable[[Decoder.Config], bool],
    needs: str,
    learns: str | None = None,
    keeps: tuple[str, ...] = (),
    sets: tuple[str, ...] = (),
) -> Callable[[Convert], Convert]:
    """Register ``convert(model, config, material) -> Decoder``, which turns a trained model into the design of ``config``.

    Args:
        name: of the recipe, as a run's config says it.
        makes: whether it leads to the design of a config.
        takes: whether it can begin with a model of this config.
        needs: what it begins with, in words, for who has something else.
        learns: only parameters whose name contains this shall learn; None for all.
        keeps: fields of the feed-forward that it takes from the trained model, such as ``router.select``.
        sets: fields of the feed-forward for which it has a value of its own where the wanted design leaves them at None.

    Raises ConfigError (when used) if another recipe has this name.
    """

    def register(convert: Convert) -> Convert:
        if name in _RECIPES:
            raise ConfigError(f"a recipe {name!r} is registered already; choose another name")
        _RECIPES[name] = _Recipe(name, needs, makes, takes, convert, learns, keeps, sets)
        return convert

    return register


def not_chosen(config: type[Config], *names: str) -> None:
    """Say that these fields of a design are the trained model's, or set by its recipe, whatever the wanted design says."""
    _NOT_CHOSEN[config] = names


def fields_beyond(config: Config, *known: type[Config], without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of ``config`` that none of the classes ``known`` has, by name; but not those in ``without``."""
    names = {field.name for cls in known for field in fields(cls)} | set(without)  # type: ignore[arg-type]
    return {field.name: getattr(config, field.name) for field in fields(config) if field.name not in names}  # type: ignore[arg-type]


def start_from(model: Decoder, config: Decoder.Config, *, seed: int, sample: Callable[[], Tensor]) -> Started:
    """A model of the design of ``config`` that begins where ``model`` is.

    The design is the kind of feed-forward, its router and its streams with their own fields; all else (width, depth, vocabulary, the
    number and width of experts) is the model's, and `kept_fields` says where ``config`` has it otherwise. Without a design of its own
    (SwiGLU under streams) the model's feed-forward stays. Balancers, capacity, ``recompute`` and ``backend`` are the wanted ones.

    Args:
        model: trained; it may share its weights with the result.
        config: whose design is wanted.
        seed, sample: see `Material`.

    Raises ConfigError where no recipe leads from the model to the design, or the model has the design with other settings.
    """
    material, used, first = Material(seed, sample), [], model.config
    wanted = [found for found in _RECIPES.values() if found.makes(config)]
    for found in wanted:
        if found.takes(model.config):
            model = found.convert(model, config, material)
            used.append(found)
    _check_kinds(model.config, config, wanted)
    keeps_layer = _keeps_layer(config)
    if not keeps_layer:
        _check_layer(model.config.feed_forward, config.feed_forward, used)
        model = _trained_as(model, config.feed_forward)
    if first.streams is not None:
        _refuse(list(differences(config.streams, model.config.streams, "model.streams")))
    learns = next((found.learns for found in reversed(used) if found.learns), None)
    return Started(model, tuple(found.name for found in used), learns)


def kept_fields(config: Decoder.Config, made: Decoder.Config) -> tuple[Difference, ...]:
    """What is the trained model's in a started model's config ``made``, although the wanted ``config`` says otherwise."""
    set_by_recipes = (name for found in _RECIPES.values() if found.makes(config) for name in found.sets)
    passed = ["model.streams", *(f"{_LAYER}.{name}" for name in (*_INITIAL, *set_by_recipes))]
    return tuple(found for found in differences(config, made, "model") if not found.is_within(*passed))


def _keeps_layer(config: Decoder.Config) -> bool:
    return config.streams is not None and type(config.feed_forward) is SwiGLU.Config


def _check_kinds(made: Decoder.Config, config: Decoder.Config, wanted: list[_Recipe]) -> None:
    ways = "; ".join(f"{found.name} starts from {found.needs}" for found in wanted) or "no recipe leads there"
    ours, theirs = config.feed_forward, made.feed_forward
    keeps = _keeps_layer(config)
    if type(ours) is not type(theirs) and not keeps:
        raise ConfigError(
            f"a model of {theirs.owner.kind!r} layers cannot start one of {ours.owner.kind!r} layers: {ways}"
        )
    scores = [_score_kind(layer) for layer in (theirs, ours)]
    if scores[0] != scores[1] and not keeps:
        raise ConfigError(f"a model whose routers are {scores[0]!r} cannot start one of {scores[1]!r} routers: {ways}")
    if type(config.streams) is not type(made.streams):
        raise ConfigError(f"the model has streams ({made.streams}), and the design wanted has {config.streams}: {ways}")


def _check_layer(theirs: FeedForward.Config, ours: FeedForward.Config, used: list[_Recipe]) -> None:
    sizes = _SIZES if isinstance(ours, MoE.Config) else ("hidden_dim",)
    passed = [*sizes, *_INITIAL, *_OF_LAYER, *(f"router.{name}" for name in _OF_ROUTER)]
    passed += _NOT_CHOSEN.get(type(ours), ())
    passed += [name for found in used for name in (*found.keeps, *found.sets)]
    paths = [f"{_LAYER}.{name}" for name in passed]
    _refuse([found for found in differences(ours, theirs, _LAYER) if not found.is_within(*paths)])


def _refuse(found: list[Difference]) -> None:
    if not found:
        return
    said = "; ".join(
        f"{each.path} is {shown(each.held)} in the model and {shown(each.wanted)} in the design" for each in found
    )
    plain = all(isinstance(each.held, bool | int | float | str) for each in found)
    sets = " ".join(f"--set {each.path}={_written(each.held)}" for each in found)
    way = sets if plain else f"set {', '.join(each.path for each in found)} to what the model has"
    raise ConfigError(f"{said} that is wanted; {way}, start from another model, or train from random weights")


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _trained_as(model: Decoder, ours: FeedForward.Config) -> Decoder:
    """``model`` with the balancers, capacity and computation of the layer ``ours``; balancers that are new begin as untrained."""
    theirs = model.config.feed_forward
    changed = {name: getattr(ours, name) for name in _OF_LAYER if hasattr(ours, name)}
    wanted, held = (getattr(layer, "router", None) for layer in (ours, theirs))
    if isinstance(wanted, Router.Config) and isinstance(held, Router.Config):
        changed["router"] = held.replace(**{name: getattr(wanted, name) for name in _OF_ROUTER})
    layer = theirs.replace(**changed) if changed else theirs
    if to_dict(layer) == to_dict(theirs):
        return model
    made = Decoder(model.config.replace(feed_forward=layer))
    state, fresh = model.state_dict(), made.state_dict()
    if state.keys() - fresh.keys():
        # A bias chooses experts as weights do, so without it the model would compute something else.
        _refuse([Difference(f"{_LAYER}.router.balance", wanted and wanted.balance, held and held.balance)])
    made.load_state_dict(fresh | state, assign=True)
    return made.to(model.embedding.weight.device).train(model.training)


def _score_kind(layer: FeedForward.Config) -> str | None:
    router = getattr(layer, "router", None)
    return None if router is None or type(layer) is SwiGLU.Config else router.score.owner.kind


def _is_plain_moe(config: Decoder.Config) -> bool:
    layer = config.feed_forward
    return type(layer) is MoE.Config and isinstance(layer.router.score, LinearScore.Config)


@recipe(
    "upcycle",
    makes=_is_plain_moe,
    takes=lambda config: type(config.feed_forward) is SwiGLU.Config,
    needs="a dense model of 'swiglu' layers",
)
def _upcycled(model: Decoder, config: Decoder.Config, material: Material) -> Decoder:
    moe, dense = config.feed_forward, model.config.feed_forward
    assert isinstance(moe, MoE.Config)
    assert isinstance(dense, SwiGLU.Config)
    slices, rest = divmod(dense.hidden_dim, moe.hidden_dim)
    choices = moe.router.select.exact_choices or 1
    if rest or not slices or moe.num_experts % slices or choices % slices:
        # Slices of this width do not fit: whole copies always do.
        moe = moe.replace(hidden_dim=dense.hidden_dim)
    return upcycle(model, moe, seed=material.seed)
