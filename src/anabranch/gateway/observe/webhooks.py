"""`Webhooks`: who wants to know is told, once, that a budget has reached a share of its limit.

    POST, application/json, signed: x-anabranch-signature: t=UNIX_SECONDS,v1=HMAC-SHA256(secret, "UNIX_SECONDS." + body) in hexadecimal

The store remembers what was sent (`store.alerts`): one POST for each budget, limit, period and share, over restarts and replicas.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import ResolveResult
from yarl import URL

from anabranch.errors import AnabranchError
from anabranch.gateway.config import WebhookConfig
from anabranch.gateway.config.observe import check_webhook_url
from anabranch.gateway.config.secret import Secret, is_reference
from anabranch.gateway.logged_error import words
from anabranch.gateway.name_resolver import NameResolver
from anabranch.gateway.store import Budget, Store, alerts
from anabranch.gateway.store.alerts import TRIES, Alert
from anabranch.gateway.store.database import Connection
from anabranch.gateway.store.period import iso
from anabranch.routers.money import dollars

logger = logging.getLogger(__name__)

# Between looks at the budgets.
LOOK_S = 5.0

# How long an alert may wait for its webhook's name to be looked up (as long as a system takes that asks several servers in vain), and one
# POST may take from there: together less than an alert stays claimed.
LOOKUP_S, POST_S = 30.0, 10.0

# How long the addresses of a name are good for. All that is to be sent is sent with one look-up.
KEEP_S = 30.0

# Before the second try, and then four times as long each time, up to the last.
RETRY_S, LONGEST_S = 30.0, 6 * 3600.0

# Of one webhook, that are open at once: many budgets may reach a share together, or have when it is set up.
_CONNECTIONS = 8

# Budgets that are looked at before requests have their turn.
_AT_ONCE = 256

# Webhook, and of the budget its subject, period, window and limit, and the share of that.
_Reached = tuple[str, str, str, int, int, float]

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_SIX_TO_FOUR = ipaddress.ip_network("2002::/16")


class Hook:
    """A webhook with what its config only refers to."""

    def __init__(self, name: str, config: WebhookConfig) -> None:
        self.name, self.config = name, config
        self.url = Secret(config.url).reveal() if is_reference(config.url) else config.url
        check_webhook_url(self.url, private=config.private)
        self.secret = config.secret.reveal().encode()
        self.resolver = HookResolver(private=config.private)
        # Each beside itself as a fraction: of ten thousand budgets, in whole numbers.
        self.shares = [(share, *Fraction(str(share)).as_integer_ratio()) for share in sorted(set(config.shares))]

    @property
    def host(self) -> str:
        """All of the URL that may be shown."""
        return urlsplit(self.url).netloc

    def is_for(self, subject: str) -> bool:
        """It is told of budgets of ``subject``."""
        return not self.config.subjects or subject in self.config.subjects


def hooks_of(configs: Mapping[str, WebhookConfig]) -> dict[str, Hook]:
    """Raises ConfigError if a secret or a URL that a config refers to is not there."""
    return {name: Hook(name, config) for name, config in configs.items()}


class Webhooks:
    """Use from one event loop.

    Attributes:
        hooks: in use, by name.

    Args:
        hooks: by name.
        store: gives the store, once it is open.
        retry_s: before the second try.

    Raises ConfigError if a secret or a URL that the config refers to is not there.
    """

    def __init__(
        self, hooks: Mapping[str, WebhookConfig], store: Callable[[], Store], *, retry_s: float = RETRY_S
    ) -> None:
        self._store, self._retry_s = store, retry_s
        self.hooks = hooks_of(hooks)
        # That are in the store already.
        self._noted: set[_Reached] = set()
        # Those that are being told, each by itself: one that does not answer holds up nobody else.
        self._telling: dict[str, asyncio.Task[None]] = {}

    async def watch(self) -> None:
        """Look at the budgets until cancelled."""
        try:
            while True:
                if self.hooks:
                    try:
                        await self._begin()
                    except AnabranchError as error:
                        logger.warning("budgets are looked at later: %s", words(error))
                await asyncio.sleep(LOOK_S)
        finally:
            telling = list(self._telling.values())
            for task in telling:
                task.cancel()
            await asyncio.gather(*telling, return_exceptions=True)

    async def look(self) -> None:
        """Note what has been reached, and send what is due. Raises CapacityError if the store cannot be used."""
        for error in await asyncio.gather(*await self._begin(), return_exceptions=True):
            if error is not None:
                raise error

    async def _begin(self) -> list[asyncio.Task[None]]:
        """Note what has been reached, and begin to send what is due, to all who are not being told already. Raises as `look`."""
        store = self._store()
        now_us = store.now_us()
        await self._note_reached(store, now_us)
        found = await store.look(lambda connection: alerts.due(connection, now_us))
        due: dict[str, list[Alert]] = {}
        for one in found:
            due.setdefault(one.body.get("webhook", ""), []).append(one)
        for name in due.keys() & self.hooks.keys() - self._telling.keys():
            self._telling[name] = asyncio.create_task(self._tell(due[name]))
            self._telling[name].add_done_callback(partial(self._told, name))
        return list(self._telling.values())

    async def _note_reached(self, store: Store, now_us: int) -> None:
        budgets = await store.budgets()
        for start in range(0, len(budgets), _AT_ONCE):
            new = list(self._reached(budgets[start : start + _AT_ONCE]))
            if new:
                told = [_alert(reached, budget, now_us) for reached, budget in new]
                await store.change(partial(_note, told, now_us))
                self._noted.update(reached for reached, _ in new)
            # Requests go on meanwhile.
            await asyncio.sleep(0)

    async def _tell(self, due: Sequence[Alert]) -> None:
        """Try those of one webhook. Raises CapacityError once all were tried, if the store could not be used."""
        places = asyncio.Semaphore(_CONNECTIONS)

        async def send(one: Alert) -> None:
            async with places:
                await self._send(one)

        ended = await asyncio.gather(*(send(one) for one in due), return_exceptions=True)
        for error in ended:
            if error is not None:
                raise error

    def _told(self, name: str, task: asyncio.Task[None]) -> None:
        del self._telling[name]
        error = None if task.cancelled() else task.exception()
        if isinstance(error, AnabranchError):
            logger.warning("webhook %s is told later: %s", name, error)
        elif error is not None:
            logger.error("webhook %s is told later: %s", name, type(error).__name__, exc_info=error)

    def _reached(self, budgets: Sequence[Budget]) -> Iterator[tuple[_Reached, Budget]]:
        """What has been reached of these budgets, and is not noted yet."""
        for budget in budgets:
            if budget.limit_nano <= 0:
                continue
            for hook in self.hooks.values():
                for share, part, of in hook.shares if hook.is_for(budget.subject) else ():
                    if budget.spent_nano * of < part * budget.limit_nano:
                        break
                    # Another limit is another budget: whoever raises one wants to know when that is reached.
                    reached = (hook.name, budget.subject, budget.period, budget.window_us, budget.limit_nano, share)
                    if reached not in self._noted:
                        yield reached, budget

    async def _send(self, alert: Alert) -> None:
        """Try one, unless another process does, or its webhook has left the config meanwhile."""
        store, hook = self._store(), self.hooks.get(alert.body["webhook"])
        if hook is None:
            return
        claimed_us = store.now_us()
        if not await store.change(lambda connection: alerts.claim(connection, alert, claimed_us)):
            return
        why = await _posted(hook, alert)
        now_us = store.now_us()
        if why is None:
            await store.change(lambda connection: alerts.arrived(connection, alert, now_us))
            return
        is_last = alert.tries + 1 >= TRIES
        wait_s = min(self._retry_s * 4**alert.tries, LONGEST_S)
        what = f"webhook {hook.name} ({hook.host}) did not take an alert of the budget of {alert.body['budget']['subject']}"
        logger.warning("%s: %s; %s", what, why, "it is given up" if is_last else f"again in {wait_s:g} s")
        await store.change(lambda connection: alerts.failed(connection, alert, now_us + round(wait_s * 1e6)))


def _note(told: list[Alert], now_us: int, connection: Connection) -> None:
    alerts.note(connection, told, now_us)


def _alert(reached: _Reached, budget: Budget, now_us: int) -> Alert:
    webhook, *_, share = reached
    id = "alert_" + hashlib.sha256(json.dumps(reached).encode()).hexdigest()[:32]
    told = {
        "subject": budget.subject,
        "period": budget.period,
        "began": iso(budget.window_us) if budget.period != "total" else None,
        "resets": None if budget.resets_us is None else iso(budget.resets_us),
        "limit_usd": dollars(budget.limit_nano),
        "spent_usd": dollars(budget.spent_nano),
    }
    body = {"id": id, "type": "budget.reached", "time": iso(now_us), "webhook": webhook, "share": share, "budget": told}
    return Alert(id=id, period=budget.period, ts_us=now_us, body=body)


def signature(secret: bytes, body: bytes, now_s: int) -> str:
    """What ``x-anabranch-signature`` says of a body that is sent at unix second ``now_s``."""
    digest = hmac.new(secret, f"{now_s}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={now_s},v1={digest}"


async def _posted(hook: Hook, alert: Alert) -> str | None:
    """POST it; None if it has arrived, else why not, without the URL."""
    body = json.dumps(alert.body, separators=(",", ":")).encode()
    try:
        url = URL(hook.url)
        host = url.host or ""
        # The resolver is not asked for addresses that are written as such.
        if not _is_address(host):
            why = await _looked_up(hook.resolver, url)
            if why is not None:
                return why
        elif not hook.config.private and not is_public(host):
            return "its address is not public, which private = true allows"
        headers = {
            "content-type": "application/json",
            "user-agent": "anabranch",
            "x-anabranch-id": alert.id,
            "x-anabranch-signature": signature(hook.secret, body, int(time.time())),
        }
        connector = aiohttp.TCPConnector(resolver=hook.resolver, limit=1, force_close=True)
        timeout = aiohttp.ClientTimeout(total=POST_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as session:
            # A redirect could lead anywhere.
            async with session.post(url, data=body, headers=headers, allow_redirects=False) as response:
                return None if 200 <= response.status < 300 else f"it answered {response.status}"
    except TimeoutError:
        return f"it did not answer within {POST_S:g} s"
    except NotPublicError:
        return "its name leads to an address that is not public, which private = true allows"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        is_private = isinstance(error.__cause__, NotPublicError) or isinstance(error.__context__, NotPublicError)
        return "its name leads to an address that is not public" if is_private else type(error).__name__


async def _looked_up(resolver: "HookResolver", url: URL) -> str | None:
    """See to it that the name's addresses are known; None, or why they are not. Raises NotPublicError if one is not public.

    Before the POST begins, and none of its time: eight at once that wait for the same name, as long as that may take, are sent then.
    """
    try:
        async with asyncio.timeout(LOOKUP_S):
            await resolver.resolve(url.raw_host or "", url.port or 0, socket.AF_UNSPEC)
    except TimeoutError:
        return f"its name was not looked up within {LOOKUP_S:g} s"
    except socket.gaierror as error:
        return f"its name was not found: {error.strerror}"
    return None


class NotPublicError(OSError):
    """A name leads to this machine or a private network."""


class HookResolver(NameResolver):
    """Addresses of names. It is these that are called: what the name means later does not matter.

    Args:
        private: names may lead to this machine or a private network; else all addresses of each must be public.
    """

    def __init__(self, *, private: bool) -> None:
        super().__init__(keep_s=KEEP_S)
        self._private = private

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """See `NameResolver`. Raises NotPublicError if one address is not public, also of those that were found before."""
        found = await super().resolve(host, port, family)
        if not self._private and not all(is_public(one["host"]) for one in found):
            raise NotPublicError("an address that is not public")
        return found


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_public(address: str) -> bool:
    """Whether anybody can have it on the internet. IPv4 inside of IPv6 counts as what it is."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or (ip.sixtofour if ip in _SIX_TO_FOUR else None)
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast
