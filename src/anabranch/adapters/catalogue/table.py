"""All cards, by their ids."""

import difflib

from anabranch.adapters.catalogue import additive, efficient, hybrid, later, low_rank, mixed, selective, structured
from anabranch.adapters.catalogue.card import Card
from anabranch.adapters.catalogue.cost import estimate
from anabranch.adapters.catalogue.shape import Shape
from anabranch.errors import ConfigError
from anabranch.extras import extras

__all__ = ["CARDS", "find", "listed", "runnable_backends"]

_FAMILIES = (additive, selective, low_rank, structured, mixed, hybrid, efficient, later)
CARDS: dict[str, Card] = {card.id: card for module in _FAMILIES for card in module.CARDS}


def find(id: str) -> Card:
    """The card of this id. Raises ConfigError for another word, with the nearest ids."""
    card = CARDS.get(id)
    if card is None:
        near = difflib.get_close_matches(id, CARDS, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "anabranch adapters list shows them all"
        raise ConfigError(f"there is no method {id!r}; {hint}")
    return card


def runnable_backends() -> tuple[str, ...]:
    """Those whose methods this installation can run: ``own``, and ``peft`` where the package is here."""
    return ("own", "peft") if not extras()["peft"].missing else ("own",)


# What a card says of methods that become part of the matrices, or are it.
MERGED = ("yes", "is the base")


def listed(
    *,
    family: str | None = None,
    backend: str | None = None,
    merges: bool | None = None,
    mixed: bool | None = None,
    needs_bias: bool | None = None,
    max_parameters: int | None = None,
    shape: Shape | None = None,
) -> list[Card]:
    """The cards that fit.

    Args:
        family: the beginning of theirs, or a part of it: ``additive``, ``prompt``.
        backend: ``own``, ``peft`` or ``none``.
        merges: whether all that was trained can become part of the matrices; of what has tasks one alone can.
        mixed: whether rows of a batch can have adapters of their own.
        needs_bias: whether the model must have biases.
        max_parameters: most numbers that may learn on a model of ``shape``, with the usual options; a method that fits no such model, or
            whose numbers cannot be told, is left out.
        shape: of the model.

    Raises ConfigError for a family or backend of none, and for ``max_parameters`` without a shape, or the other way round.
    """
    families = sorted({card.family for card in CARDS.values()})
    if family is not None and not any(family and _is_of(one, family) for one in families):
        raise ConfigError(f"there is no family {family!r}; use one of {', '.join(families)}")
    if backend not in (None, "own", "peft", "none"):
        raise ConfigError(f"backend is {backend!r}; use one of own, peft, none")
    if (max_parameters is None) != (shape is None):
        raise ConfigError("how many numbers learn depends on the model: give max_parameters and shape, or neither")
    return [
        card
        for card in CARDS.values()
        if (family is None or _is_of(card.family, family))
        and backend in (None, card.backend)
        and merges in (None, card.merges in MERGED)
        and mixed in (None, card.mixed != "no")
        and needs_bias in (None, card.needs_bias)
        and (max_parameters is None or shape is None or _learns_at_most(card, shape, max_parameters))
    ]


def _learns_at_most(card: Card, shape: Shape, most: int) -> bool:
    try:
        return estimate(card, shape).trainable <= most
    except ConfigError:
        return False


def _is_of(family: str, wanted: str) -> bool:
    return family.startswith(wanted) or wanted in family.split("/")
