"""For whom a request speaks: whose budgets it spends, and under whose name its row stands, where its sender names a user or tags.

A name in a request is anybody's to write. It is taken as it stands only from who may speak for it; of others it is a name of their own,
``KEY/NAME``, which touches no budget and no record of anybody else:

    key "web" (id k1, speaks for user:*)    names ann    ->  user:ann
    key "ci"  (id k2, speaks for nobody)    names ann    ->  user:k2/ann

A key's own user and tags are the operator's words, and count in any case.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from anabranch.errors import InputError
from anabranch.gateway.store.records import KeyRecord, check_tags, listed, plain

# Whoever has no key, where a key's id would stand.
ANONYMOUS = "anonymous"
EVERYBODY = "*"

# What a request may name, in budgets.
NAMED = ("user", "tag")


@dataclass(frozen=True, slots=True)
class Spoken:
    """What a request counts under.

    Attributes:
        user: empty for nobody's.
        tags: the key's, and those that its sender named.
    """

    user: str
    tags: tuple[str, ...]


def check_speaks_for(what: str, items: Any) -> tuple[str, ...]:
    """For whom somebody may speak: ``user:NAME``, ``tag:NAME``, ``user:*``, ``tag:*`` or ``*``, each once. Raises InputError."""
    return tuple(dict.fromkeys(_checked(what, item) for item in listed(what, items)))


def _checked(what: str, item: str) -> str:
    scope, mark, name = item.partition(":")
    if item == EVERYBODY or (scope in NAMED and name == EVERYBODY):
        return item
    if mark and scope == "user" and plain(name):
        return f"user:{plain(name)}"
    if mark and scope == "tag":
        return f"tag:{check_tags([name])[0]}"
    raise InputError(f"{what} has {item!r:.100}; it must be user:NAME, tag:NAME, user:*, tag:* or *")


def speaks_for(key: KeyRecord | None, default: Sequence[str] | None, *, has_keys: bool) -> tuple[str, ...]:
    """For whom a request may speak.

    Args:
        key: that it came with; what it says goes before the default.
        default: of the gateway's config; None where that says nothing: then a key speaks for nobody else, and a request without one
            for everybody as long as there are no keys, and so nobody to speak for in their place.
        has_keys: there are keys in the store.
    """
    if key is not None and key.speaks_for:
        return key.speaks_for
    if default is not None:
        return tuple(default)
    return (EVERYBODY,) if key is None and not has_keys else ()


def spoken(key: KeyRecord | None, allowed: Sequence[str], *, user: str = "", tags: Iterable[str] = ()) -> Spoken:
    """What a request counts under that names a user and tags.

    Args:
        key: that it came with; its own user goes before the one that is named.
        allowed: see `speaks_for`.
        user, tags: that its sender names.

    Raises InputError for a tag that may not be.
    """
    own_tags = () if key is None else key.tags
    named = [tag if tag in own_tags else _as(key, allowed, "tag", tag) for tag in check_tags(tags)]
    user = plain(user)
    if key is not None and key.user:
        user = key.user
    elif user:
        user = plain(_as(key, allowed, "user", user))
    return Spoken(user, tuple(dict.fromkeys((*own_tags, *named))))


def _as(key: KeyRecord | None, allowed: Sequence[str], scope: str, name: str) -> str:
    is_allowed = any(one in allowed for one in (EVERYBODY, f"{scope}:{EVERYBODY}", f"{scope}:{name}"))
    return name if is_allowed else own_name("" if key is None else key.id, name)


def own_name(key_id: str, name: str) -> str:
    """A name as only one key can say it: ``KEY/NAME``. ``key_id`` is "" for who has none."""
    return f"{key_id or ANONYMOUS}/{name}"
