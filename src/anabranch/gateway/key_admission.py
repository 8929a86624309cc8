"""`KeyAdmission`: who a request is from, by its key, and whether what is answered without a model has room beside the key's requests."""

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from anabranch.errors import CapacityError, RateError
from anabranch.gateway.config import GatewayConfig
from anabranch.gateway.core.admission import Admission, Left, Limits, limits_of
from anabranch.gateway.core.held_body import HeldBody
from anabranch.gateway.refusals import limited, unavailable
from anabranch.gateway.store import KeyRecord, Store
from anabranch.web.api_error import ApiError
from anabranch.web.body_room import BodyRoom
from anabranch.web.ids import new_id
from anabranch.web.large_json import LARGE

# Of the room for bodies that others leave, so much is for one key: however many it sends, another finds room for one.
BODY_SHARE = 0.5


class KeyAdmission:
    """That of one gateway.

    Args:
        store: gives the store, open.
        config: gives the config that is in use now.
        admission: of requests and tokens, by key.
        on_refused: told the code of what is refused before its body is read.
    """

    def __init__(
        self,
        store: Callable[[], Store],
        config: Callable[[], GatewayConfig],
        admission: Admission,
        on_refused: Callable[[Any], None],
    ) -> None:
        self._store, self._config, self._admission, self._on_refused = store, config, admission, on_refused
        limit = config().limits.room_for_bodies
        self._room = BodyRoom(limit, BODY_SHARE, 429, lambda: on_refused("overloaded"))

    async def authenticate(self, secret: str | None) -> KeyRecord | None:
        """The key a request came with; None where none is needed and none that is known was sent. Raises ApiError (401, 503)."""
        store = self._store()
        try:
            record = await store.key_of(secret) if secret else None
            # A key that is wrong, or has ended, opens no more than none does, and is hardly meant.
            is_wrong = record is None and bool(secret) and await store.has_keys()
        except CapacityError as error:
            raise unavailable(error) from None
        if is_wrong or (record is None and self._config().require_key):
            what = "is not known, or not valid any more" if secret else "is missing"
            message = f"the key {what}; send Authorization: Bearer KEY (anabranch gateway keys create makes one)"
            raise ApiError(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})
        return record

    def _limits(self, record: KeyRecord | None) -> tuple[str, Limits]:
        return ("" if record is None else record.id), limits_of(record, self._config().limits)

    def left(self, record: KeyRecord | None) -> dict[str, Left]:
        """What is left of the limits of a key; nothing is told to who comes without one, and shares them with others."""
        return {} if record is None else self._admission.left(*self._limits(record))

    async def admit(self, record: KeyRecord | None) -> None:
        """Count what is answered here alone as a request of its key. Raises ApiError (429)."""
        tenant, limits = self._limits(record)
        try:
            await self._admission.count(tenant, new_id(), limits)
        except RateError as error:
            raise limited(error) from None

    @contextlib.asynccontextmanager
    async def counted(self, record: KeyRecord | None, held: HeldBody | None = None) -> AsyncIterator[None]:
        """`admit`, and a request under way as long as the block lasts, in the place of its body if that was held. Raises ApiError (429)."""
        (tenant, limits), id = self._limits(record), new_id()
        try:
            await self._admission.enter(tenant, id, 0, replace(limits, tpm=None), held)
        except RateError as error:
            raise limited(error) from None
        try:
            yield
        finally:
            self._admission.leave(tenant, id)

    async def hold(self, record: KeyRecord | None, num_bytes: int | None) -> HeldBody:
        """Room for a body that is to be read. A large one, or one of unknown size, is a request of its key under way from here on.

        Args:
            record: of the key.
            num_bytes: that the body says it has; None if it does not say.

        Raises ApiError (429), and nothing is taken, where its key has no room for one more request or there is none for its bytes.
        """
        tenant, limits = self._limits(record)
        self._room.limit = self._config().limits.room_for_bodies
        leave = None
        if num_bytes is None or num_bytes > LARGE:
            try:
                leave = await self._admission.hold(tenant, limits)
            except RateError as error:
                refusal = limited(error)
                self._on_refused(refusal.code)
                raise refusal from None
        try:
            return HeldBody(self._room.enter(tenant, num_bytes), leave)
        except ApiError:
            if leave is not None:
                leave()
            raise
