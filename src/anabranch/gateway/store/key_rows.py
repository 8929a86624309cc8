"""Keys as operators name and change them: what their fields may be, and the statements that write them. `keyring` knows their secrets."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from anabranch.bounds import finite, shown, whole
from anabranch.errors import InputError
from anabranch.gateway.store import schema
from anabranch.gateway.store.database import Connection, Row
from anabranch.gateway.store.keyring import digest_of
from anabranch.gateway.store.records import OUR_TAGS, KeyRecord, check_tags, clean, joined, listed, plain
from anabranch.gateway.store.speaking import check_speaks_for

# What an operator may say of a key, see `KeyRecord`; of its end, in unix seconds.
FIELDS = (
    "name",
    "user",
    "team",
    "tags",
    "models",
    "rpm",
    "tpm",
    "max_in_flight",
    "expires_s",
    "is_admin",
    "speaks_for",
)

# Unix seconds: the end of the year 9999, up to which times can be shown.
LAST_S = 253_402_300_799
_TAKEN = (
    "EXISTS (SELECT 1 FROM keys AS other WHERE other.name = :named AND other.name <> ''"
    " AND other.revoked_us IS NULL AND other.id <> :id)"
)


class UnknownKeyError(InputError):
    """No key, or several, are meant by what should name one."""


def checked(fields: Mapping[str, Any], now_us: int) -> dict[str, Any]:
    """Columns of `schema.KEYS` with the values that ``fields`` come to. Raises InputError, which begins with the field."""
    if unknown := sorted(set(fields) - set(FIELDS)):
        raise InputError(f"{unknown[0]} is no field of a key; there are {', '.join(FIELDS)}")
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if name in ("name", "user", "team"):
            if not isinstance(value, str):
                raise InputError(f"{name} is {shown(value)}; it must be text")
            found["owner" if name == "user" else name] = clean(value).strip() if name == "name" else plain(value)
        elif name == "tags":
            found[name] = joined(_own_tags(value))
        elif name == "models":
            found[name] = joined(listed(name, value))
        elif name == "speaks_for":
            found[name] = joined(check_speaks_for(name, value))
        elif name in ("rpm", "tpm", "max_in_flight"):
            found[name] = None if value is None else whole(name, value, 1)
        elif name == "expires_s":
            found["expires_us"] = None if value is None else _end(value, now_us)
        else:
            if not isinstance(value, bool):
                raise InputError(f"{name} is {shown(value)}; it must be true or false")
            found[name] = int(value)
    return found


def _own_tags(tags: Any) -> Sequence[str]:
    found = check_tags(tags)
    if ours := OUR_TAGS.intersection(found):
        raise InputError(f"the tag {min(ours)} is that of the gateway's own questions, and no key may carry it")
    return found


def _end(value: Any, now_us: int) -> int:
    end_us = int(finite("expires_s", value, 0, LAST_S) * 1e6)
    if end_us <= now_us:
        raise InputError("expires_s has passed: the key would have expired already")
    return end_us


def new_row(fields: Mapping[str, Any], secret: str, now_us: int) -> Row:
    """The row of a new key, in the order of `schema.KEYS`. Raises InputError."""
    empty = {"name": "", "owner": "", "team": "", "tags": "", "models": "", "is_admin": 0, "speaks_for": ""}
    values = {**empty, **checked(fields, now_us), **_of_secret(secret)}
    values |= {"id": f"k{secrets.token_hex(6)}", "created_us": now_us}
    return tuple(values.get(column) for column in schema.KEYS)


def _of_secret(secret: str) -> dict[str, Any]:
    return {"hash": digest_of(secret), "hint": secret[-4:]}


def insert(connection: Connection, row: Row) -> bool:
    """Write a new key; whether its name was free."""
    return bool(connection.insert("keys", schema.KEYS, [row]))


def update(connection: Connection, key_id: str, columns: Mapping[str, Any]) -> bool:
    """Change a key that has not been revoked; whether there is one, and its new name, if it gets one, was free."""
    sets = ", ".join(f"{column} = :{column}" for column in columns)
    sql = f"UPDATE keys SET {sets} WHERE keys.id = :id AND keys.revoked_us IS NULL"
    if "name" in columns:
        return bool(connection.run(f"{sql} AND NOT {_TAKEN}", id=key_id, named=columns["name"], **columns))
    return bool(connection.run(sql, id=key_id, **columns))


def renew(connection: Connection, key_id: str, secret: str) -> bool:
    """Give a key that has not been revoked another secret; whether there is one."""
    return update(connection, key_id, _of_secret(secret))


def any_key(connection: Connection) -> bool:
    """There is a key, be it one that has ended."""
    return bool(connection.rows("SELECT 1 FROM keys LIMIT 1"))


def meant(keys: Sequence[KeyRecord], named: str) -> KeyRecord:
    """The key with this id or name, or whose id alone begins so. Raises UnknownKeyError if there is none, or there are several."""
    found = [key for key in keys if named and key.id == named]
    found = found or [key for key in keys if named and key.name == named and key.revoked_us is None]
    found = found or [key for key in keys if named and key.id.startswith(named)]
    revoked = [key for key in keys if named and key.name == named and key.revoked_us is not None]
    if revoked and not found:
        raise UnknownKeyError(
            f"the key {named!r:.100} ({revoked[-1].id}) was revoked, which is for good; make another, which may have its name"
        )
    if len(found) != 1:
        raise UnknownKeyError(
            f"{len(found) or 'no'} keys have the name {named!r:.100} or an id that begins so; anabranch gateway keys list shows them"
        )
    return found[0]


def taken(name: str) -> InputError:
    """The name of a key is that of another one."""
    return InputError(f"name is {name!r}, as that of another key; names of keys must differ")
