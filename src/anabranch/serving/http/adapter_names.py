"""Which adapters a request means, by the name of its model or by its field ``adapters``; and which names there are."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from anabranch.errors import InputError
from anabranch.serving.core.client import EngineClient, EngineInfo
from anabranch.serving.core.mixture import MOST_MIXED, MOST_WEIGHT, Mixture, check_mixture, equal
from anabranch.serving.http.generation_request import check_model
from anabranch.web.api_error import ApiError, wrong, wrong_field
from anabranch.web.body import said

__all__ = ["AdapterNames", "chosen"]

# What a base may be called in front of an adapter, beside its names.
BASE = "base"
MOST_NAME, MOST_SHOWN = 256, 10


class AdapterNames:
    """The adapters of an engine as its front end knows them; an engine that is started again has those that came by HTTP again.

    Attributes:
        pinned: that the engine has from its start.
        folders: of the others, by name.
        versions: of their numbers, by name.
        is_there: whether the engine can have any.
        root: folder that those of ``folders`` are below, whenever they are read; None where there are none.

    Args:
        root: see above.
    """

    def __init__(self, root: str | None = None) -> None:
        self.root = None if root is None else os.path.abspath(root)
        self.pinned: tuple[str, ...] = ()
        self.folders: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self.is_there = False

    @property
    def all(self) -> tuple[str, ...]:
        """Each name once."""
        return *self.pinned, *self.folders

    def __contains__(self, name: object) -> bool:
        return name in self.folders or name in self.pinned

    async def begin(self, engine: EngineClient, info: EngineInfo) -> None:
        """An engine has been started: tell it of those that its predecessor was told of."""
        self.is_there, self.pinned = info.adapters is not None, info.adapters or ()
        for name, folder in self.folders.items():
            # Its folder may hold others now, whom nobody has loaded.
            version = self.versions.get(name, "")
            await engine.control("register_adapter", adapter=name, folder=folder, root=self.root, version=version)

    def told(self, mixture: Mixture) -> tuple[tuple[str, str], ...]:
        """The versions of those of a mixture that came by HTTP, by name: what `fingerprint` has beside the engine's own."""
        return tuple(sorted((name, self.versions[name]) for name, _ in mixture if name in self.versions))


def chosen(body: Mapping[str, Any], bases: Sequence[str], known: AdapterNames, *, is_needed: bool = True) -> Mixture:
    """The adapters of a request; none for the base.

    Args:
        body: of the request.
        bases: names of the model without adapters.
        known: adapters.
        is_needed: it has to name a model.

    Raises ApiError: 400 for what cannot be, 404 for a model or adapter that there is not.
    """
    named = _of_model(body, bases, known, is_needed)
    given = body.get("adapters")
    if given is None:
        return named
    if named:
        raise wrong_field("adapters", "is given, and model names adapters too; say them in one of the two")
    if not isinstance(given, dict):
        raise wrong_field("adapters", f"is {said(given)}; it must be an object of adapters and their weights")
    if len(given) > MOST_MIXED:
        raise wrong_field("adapters", f"has {len(given):,} names; a mixture has at most {MOST_MIXED}")
    for name, weight in given.items():
        if name not in known:
            shown = name[:80] if name.isprintable() else "?"
            there = f"this server has {_listed(known.all)}" if known.all else _listed(known.all)
            raise ApiError(404, "adapter_not_found", f"there is no adapter {shown!r}; {there}", param="adapters")
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        # A NaN is not less.
        if not is_number or not abs(weight) <= MOST_WEIGHT:
            raise wrong_field(
                f"adapters.{name}", f"is {said(weight)}; it must be a number from {-MOST_WEIGHT:g} to {MOST_WEIGHT:g}"
            )
    return tuple((name, float(weight)) for name, weight in given.items())


def _of_model(body: Mapping[str, Any], bases: Sequence[str], known: AdapterNames, is_needed: bool) -> Mixture:
    name = body.get("model")
    is_other = isinstance(name, str) and 0 < len(name) <= MOST_NAME and name not in bases
    if not is_other or not known.all:
        check_model(body, bases, is_needed=is_needed)
        return ()
    assert isinstance(name, str)
    # The longest: a base may be called as another with something behind it.
    front = max((f"{base}:" for base in (*bases, BASE) if name.startswith(f"{base}:")), key=len, default="")
    names = name[len(front) :].split("+")
    if any(part not in known for part in names):
        shown = name[:80] if name.isprintable() else "?"
        has = f"this server has {', '.join(map(repr, bases))}, and {_listed(known.all)}"
        raise ApiError(404, "model_not_found", f"there is no model {shown!r}; {has}", param="model")
    made = equal(names)
    try:
        check_mixture(made)
    except InputError as error:
        raise wrong("model", str(error)) from None
    return made


def _listed(names: Iterable[str]) -> str:
    """What there is, in words."""
    names = list(names)
    more = f" and {len(names) - MOST_SHOWN:,} more" if len(names) > MOST_SHOWN else ""
    told = ", ".join(map(repr, names[:MOST_SHOWN]))
    return f"the adapters {told}{more}" if names else "there are none"
