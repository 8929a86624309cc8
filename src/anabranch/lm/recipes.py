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
from anabranch.lm.upcycle import upcycle
from anabranch.nn import MoE, SwiGLU
from anabranch.routing import LinearScore

__all__ = ["Material", "Started", "fields_beyond", "not_chosen", "recipe", "start_from"]


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


def recipe(
    name: str,
    *,
    makes: Callable[[Decoder.Config], bool],
    takes: Callable[[Decoder.Config], bool],
    needs: str,
    learns: str | None = None,
) -> Callable[[Convert], Convert]:
    """Register ``convert(model, config, material) -> Decoder``, which turns a trained model into the design of ``config``.

    Args:
        name: of the recipe, as a run's config says it.
        makes: whether it leads to the design of a config.
        takes: whether it can begin with a model of this config.
        needs: what it begins with, in words, for who has something else.
        learns: only parameters whose name contains this shall learn; None for all.

    Raises ConfigError (when used) if another recipe has this name.
    """

    def register(convert: Convert) -> Convert:
        if name in _RECIPES:
            raise ConfigError(f"a recipe {name!r} is registered already; choose another name")
        _RECIPES[name] = _Recipe(name, needs, makes, takes, convert, learns)
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
    number and width of experts) is the model's. Without a design of its own (SwiGLU under streams) the model's feed-forward stays.

    Args:
        model: trained; it may share its weights with the result.
        config: whose design is wanted.
        seed, sample: see `Material`.

    Raises ConfigError where no recipe leads from the model to the design, or the model has the design with other settings.
    """
    material, used, learns = Material(seed, sample), [], None
    wanted = [found for found in _RECIPES.values() if found.makes(config)]
    for found in wanted:
        if found.takes(model.config):
            model, learns = found.convert(model, config, material), found.learns or learns
            used.append(found.name)
    _check_design(model.config, config, wanted)
    return Started(model, tuple(used), learns)


def _check_design(made: Decoder.Config, config: Decoder.Config, wanted: list[_Recipe]) -> None:
    ways = "; ".join(f"{found.name} starts from {found.needs}" for found in wanted) or "no recipe leads there"
    ours, theirs = config.feed_forward, made.feed_forward
    keeps = config.streams is not None and type(ours) is SwiGLU.Config
    if type(ours) is not type(theirs) and not keeps:
        raise ConfigError(
            f"a model of {theirs.owner.kind!r} layers cannot start one of {ours.owner.kind!r} layers: {ways}"
        )
    scores = [_score_kind(layer) for layer in (theirs, ours)]
    if scores[0] != scores[1] and not keeps:
        raise ConfigError(f"a model whose routers are {scores[0]!r} cannot start one of {scores[1]!r} routers: {ways}")
    if type(config.streams) is not type(made.streams):
        raise ConfigError(f"the model has streams ({made.streams}), and the design wanted has {config.streams}: {ways}")
    if keeps:
        return
    for name, value in fields_beyond(ours, MoE.Config, SwiGLU.Config).items():
        held = getattr(theirs, name)
        if to_dict(held) != to_dict(value) and name not in _NOT_CHOSEN.get(type(ours), ()):
            raise ConfigError(
                f"{name} is {held!r} in the model and {value!r} in the design that is wanted; set "
                f"model.feed_forward.{name} to what the model has, or start from another model"
            )


def _score_kind(layer: Any) -> str | None:
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
    top_k = getattr(moe.router.select, "top_k", 1)
    if rest or not slices or moe.num_experts % slices or top_k % slices:
        # Slices of this width do not fit: whole copies always do.
        moe = moe.replace(hidden_dim=dense.hidden_dim)
    return upcycle(model, moe, seed=material.seed)
