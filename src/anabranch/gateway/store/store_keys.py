"""Keys in a `Store`: looked up at each request, made, edited, rotated and revoked."""

import hmac
import time
from collections.abc import Callable, Iterable
from typing import Any

from anabranch.errors import InputError
from anabranch.gateway.store import key_rows, queries
from anabranch.gateway.store.database import Database
from anabranch.gateway.store.keyring import FRESH_S, Keyring, digest_of, new_secret
from anabranch.gateway.store.records import KeyRecord, check_subject
from anabranch.gateway.store.store_access import StoreAccess


class StoreKeys(StoreAccess):
    """Keys. What another process changes of them is seen within two seconds."""

    def __init__(self, database: Database, *, serves: bool = True, clock: Callable[[], float] = time.time) -> None:
        super().__init__(database, serves=serves, clock=clock)
        self._keyring = Keyring()

    async def key_of(self, secret: str) -> KeyRecord | None:
        """The key a sender came with; None if there is none like it, or it was revoked or has expired.

        What another process changes is seen within two seconds. Raises CapacityError if the store cannot be read for `PATIENCE_S`.
        """
        digest = digest_of(secret)
        found = self._keyring.get(digest)
        if found is None:
            read = await self._patient(lambda: self._read_key(digest))
            if read is None:
                return None
            stored, record = read
        else:
            stored, record, age_s = found
            if age_s > FRESH_S:
                self._in_background(self._read_key(digest))
        if not hmac.compare_digest(stored, digest) or not record.is_valid(self._now_us()):
            return None
        return record

    async def _read_key(self, digest: str) -> tuple[str, KeyRecord] | None:
        generation = self._keyring.generation
        found = await self._ask(lambda connection: queries.find_key(connection, digest))
        if found is not None:
            self._keyring.put(digest, *found, generation)
        return found

    async def has_keys(self) -> bool:
        """Whether there is any key, be it one that has ended. One that another process makes is seen within two seconds."""
        known = self._keyring.has_any
        if known is None:
            known = await self._ask(key_rows.any_key)
            self._keyring.note_any(known)
        return known

    async def create_key(
        self,
        name: str = "",
        *,
        user: str = "",
        team: str = "",
        tags: Iterable[str] = (),
        models: Iterable[str] = (),
        rpm: int | None = None,
        tpm: int | None = None,
        max_in_flight: int | None = None,
        expires_s: float | None = None,
        is_admin: bool = False,
        speaks_for: Iterable[str] = (),
    ) -> tuple[str, KeyRecord]:
        """A new key, and what is known of it. The key is shown this once.

        Args:
            name: unlike that of any other key that has not been revoked; several may have none.
            expires_s: unix seconds; None for never.

        See `KeyRecord` for the others. Raises InputError for a value that may not be.
        """
        secret = new_secret()
        fields = {
            "name": name,
            "user": user,
            "team": team,
            "tags": tags,
            "models": models,
            "rpm": rpm,
            "tpm": tpm,
            "expires_s": expires_s,
            "max_in_flight": max_in_flight,
            "is_admin": is_admin,
            "speaks_for": speaks_for,
        }
        row = key_rows.new_row(fields, secret, self._now_us())
        record = queries.read_key(row)
        is_made = await self._do(lambda connection: key_rows.insert(connection, row))
        self._keyring.forget()
        if not is_made:
            raise key_rows.taken(record.name)
        return secret, record

    async def edit_key(self, key_id: str, **fields: Any) -> KeyRecord:
        """Change what is known of a key; its secret, and what was spent with it, stay as they are.

        Args:
            key_id: its id, how that begins, or its name.
            fields: those to change, see `create_key`.

        Raises InputError for a key that is not there or was revoked, or a value that may not be.
        """
        key = await self._live_key(key_id)
        columns = key_rows.checked(fields, self._now_us())
        if columns and not await self._do(lambda connection: key_rows.update(connection, key.id, columns)):
            # Unless it was revoked meanwhile.
            await self._live_key(key.id)
            raise key_rows.taken(columns.get("name", ""))
        return await self._changed_key(key)

    async def rotate_key(self, key_id: str) -> tuple[str, KeyRecord]:
        """Give a key another secret, which is shown this once; the old one ends. All else stays as it is.

        Raises InputError as `edit_key` does.
        """
        key, secret = await self._live_key(key_id), new_secret()
        await self._do(lambda connection: key_rows.renew(connection, key.id, secret))
        return secret, await self._changed_key(key)

    async def _live_key(self, key_id: str) -> KeyRecord:
        key = key_rows.meant(await self.keys(), key_id)
        if key.revoked_us is not None:
            raise InputError(f"the key {key.id} was revoked, which is for good; make another")
        return key

    async def _changed_key(self, key: KeyRecord) -> KeyRecord:
        self._keyring.forget()
        return next(one for one in await self.keys() if one.id == key.id)

    async def keys(self) -> list[KeyRecord]:
        """All keys, the revoked ones too, oldest first."""
        return await self._read(queries.read_keys)

    async def revoke_key(self, key_id: str) -> KeyRecord:
        """End a key for good. Raises InputError if there is none of this id or name, or several ids begin so."""
        key, now_us = key_rows.meant(await self.keys(), key_id), self._now_us()
        await self._do(lambda connection: key_rows.update(connection, key.id, {"revoked_us": now_us}))
        return await self._changed_key(key)

    async def named_subject(self, subject: str) -> str:
        """``subject`` as requests carry it: with the id of the key where its name, or the beginning of its id, was given.

        Raises InputError for what is no subject, UnknownKeyError for a key that is not there, which a limit would never apply to.
        """
        subject = check_subject(subject)
        scope, _, name = subject.partition(":")
        return f"key:{key_rows.meant(await self.keys(), name).id}" if scope == "key" else subject
