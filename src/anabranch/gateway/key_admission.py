"""`KeyAdmission`: who a request is from, by its key, and whether what is answered without a model has room beside the key's requests."""

import contextlib
from collections.abc import Callable, Iterator

from anabranch.errors import CapacityError, RateError
from anabranch.gateway.config import GatewayConfig
from anabranch.gateway.core.in_flight import InFlight
from anabranch.gateway.refusals import limited, unavailable
from anabranch.gateway.store import KeyRecord, RateLimits, Store
from anabranch.web.api_error import ApiError


class KeyAdmission:
    """That of one gateway.

    Args:
        store: gives the store, open.
        config: gives the config that is in use now.
        rates: of requests and tokens, by key.
        senders: how many requests each key has under way.
    """

    def __init__(
        self,
        store: Callable[[], Store],
        config: Callable[[], GatewayConfig],
        rates: RateLimits,
        senders: InFlight,
    ) -> None:
        self._store, self._config, self._rates, self._senders = store, config, rates, senders

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

    def admit(self, record: KeyRecord | None) -> None:
        """Count what is answered here alone as a request of its key. Raises ApiError (429)."""
        tenant, rpm = ("", None) if record is None else (record.id, record.rpm)
        try:
            self._rates.admit(tenant, 0, rpm=rpm or self._config().limits.rpm, tpm=None)
        except RateError as error:
            raise limited(error) from None

    @contextlib.contextmanager
    def counted(self, record: KeyRecord | None) -> Iterator[None]:
        """`admit`, and a request under way as long as the block lasts. Raises ApiError (429)."""
        tenant, most = ("", None) if record is None else (record.id, record.max_in_flight)
        try:
            self._senders.enter(tenant, most or self._config().limits.max_in_flight)
        except RateError as error:
            raise limited(error) from None
        try:
            self.admit(record)
            yield
        finally:
            self._senders.leave(tenant)
