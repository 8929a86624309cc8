"""``/admin/*``: what operators do. Every route needs the admin key, or a key of the store that is an admin's."""

import contextlib
import dataclasses
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from aiohttp import web

from anabranch.config import to_dict
from anabranch.errors import AnabranchError, CapacityError, DataError, InputError
from anabranch.gateway.config.redact import redacted
from anabranch.gateway.decision_checks import BypassError
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.access import check_operator, check_origin
from anabranch.gateway.http.peers import PeerError, Peers
from anabranch.gateway.learning.erasures import NotForgottenError
from anabranch.gateway.logged_error import words
from anabranch.gateway.refusals import unavailable
from anabranch.gateway.shared import AwayError, Shared
from anabranch.gateway.store import GROUPS, Budget, KeyRecord, LedgerQuery, Spend, key_rows
from anabranch.gateway.store.key_rows import FIELDS, UnknownKeyError
from anabranch.gateway.store.period import PERIODS
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.data.jsonl import row_of
from anabranch.routers.data.table import gather
from anabranch.routers.money import dollars, nano_dollars
from anabranch.web.answers import NOT_STORED, json_response, read_body
from anabranch.web.api_error import ApiError, wrong
from anabranch.web.body import parse
from anabranch.web.json_size import MOST_PARTS, MOST_VALUES, check_json_size
from anabranch.web.json_text import Rows
from anabranch.web.large_json import is_light, json_slices
from anabranch.web.slices import send_json, sliced
from anabranch.web.turns import Turns, in_thread

T = TypeVar("T")
Work = Callable[["_Call"], Awaitable[Any]]
MOST_ROWS = 1000
# Rows that are made at once, and told so if they weigh little; more are made and written some at a time, while requests go on.
AT_ONCE = 50
# Longest that a write may wait for its reader.
STALL_S = 30.0
DIGITS = 20

# Of a key, beside its fields: the most it may spend, and in which period.
BUDGET = ("budget_usd", "period")
_WITH_BODY = ("POST", "PUT", "PATCH")


class _Call:
    """One request: its path's names, its query, its body."""

    def __init__(self, request: web.BaseRequest, name: str, body: dict[str, Any]) -> None:
        self.query, self.name, self.body = request.query, name, body

    def number(self, name: str, default: int, most: int = MOST_ROWS) -> int:
        """A number of the query. Raises ApiError."""
        text = self.query.get(name)
        if text is None:
            return default
        # Digits alone; thousands of them are none that Python reads.
        is_number = text.isascii() and text.isdigit() and len(text) <= DIGITS
        if not is_number or not 1 <= int(text) <= most:
            raise wrong(name, f"{name} is {text[:20]!r}; it must be a number from 1 to {most:,}")
        return int(text)

    def flag(self, name: str) -> bool:
        """Yes or no of the query. Raises ApiError."""
        text = self.query[name]
        if text not in ("true", "false"):
            raise wrong(name, f"{name} is {text[:20]!r}; it must be true or false")
        return text == "true"

    def text(self, name: str, default: str = "") -> str:
        """A text of the body. Raises ApiError."""
        value = self.body.get(name, default)
        if not isinstance(value, str):
            raise wrong(name, f"{name} must be text")
        return value


class AdminRoutes:
    """The admin interface of one gateway."""

    def __init__(
        self, gateway: Gateway, on_reload: Callable[[], Awaitable[None]] | None, peers: Peers | None = None
    ) -> None:
        self._gateway, self._on_reload, self._peers, self._writing = gateway, on_reload, peers, Turns()
        self._table: dict[str, dict[str, Work]] = {
            "keys": {
                "GET": self._keys,
                "POST": self._create_or_rotate_key,
                "PATCH": self._edit_key,
                "DELETE": self._revoke_key,
            },
            "budgets": {"GET": self._budgets, "PUT": self._set_budget, "DELETE": self._remove_budget},
            "providers": {"GET": self._providers},
            "strategies": {"GET": self._strategies},
            "models": {"POST": self._add_model},
            "explain": {"POST": self._explain},
            "decisions": {"GET": self._decisions},
            "feedback": {"GET": self._feedback},
            "ledger": {"GET": self._ledger},
            "spend": {"GET": self._spend},
            "cache": {"DELETE": self._clear},
            "ic-cache": {"POST": self._ic_cache},
            "config": {"GET": self._config},
            "reload": {"POST": self._reload},
        }

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """``/admin/THING`` or ``/admin/THING/NAME``."""
        await check_operator(self._gateway, request, local=False)
        thing, _, name = request.rel_url.raw_path.removeprefix("/admin/").partition("/")
        methods = self._table.get(thing)
        if methods is None:
            raise ApiError(404, "not_found", f"there is no /admin/{thing[:40]}; there are {', '.join(self._table)}")
        work = methods.get(request.method)
        if work is None:
            allowed = ", ".join(methods)
            raise ApiError(405, "wrong_method", f"/admin/{thing} takes {allowed}", headers={"Allow": allowed})
        body: dict[str, Any] = {}
        check_origin(request)
        if request.method in _WITH_BODY and thing != "reload" and not name.endswith("/rotate"):
            limits = self._gateway.config.limits
            raw = await read_body(request, limits.body_bytes, limits.body_timeout_s)
            check_json_size(raw, MOST_VALUES, MOST_PARTS)
            body = parse(raw)
        try:
            told = await work(_Call(request, unquote(name), body))
        except UnknownKeyError as error:
            raise ApiError(404, "unknown_key", str(error)) from None
        if is_light(told):
            return json_response(told)
        async with contextlib.aclosing(sliced(self._writing, "", json_slices(told))) as slices:
            return await send_json(request, NOT_STORED, slices, STALL_S)

    async def _keys(self, call: _Call) -> Any:
        return {"keys": _rows(await self._gateway.store.keys())}

    async def _create_or_rotate_key(self, call: _Call) -> Any:
        """``POST /admin/keys`` makes one, ``POST /admin/keys/ID/rotate`` gives one another secret."""
        id, _, verb = call.name.rpartition("/")
        if call.name and (verb != "rotate" or not id):
            raise ApiError(
                404, "not_found", "POST /admin/keys makes a key, POST /admin/keys/ID/rotate gives it another secret"
            )
        fields, limit = _key_fields(call.body)
        made = self._gateway.store.rotate_key(id) if call.name else self._gateway.store.create_key(**fields)
        secret, record = await _told(made)
        return {"secret": secret, "key": _fields(record), **await self._limit(record, limit)}

    async def _edit_key(self, call: _Call) -> Any:
        if not call.body:
            raise wrong(
                "body", f"nothing is said of the key that could be changed; give one of {', '.join((*FIELDS, *BUDGET))}"
            )
        fields, limit = _key_fields(call.body)
        record = await _told(self._gateway.store.edit_key(call.name, **fields))
        return {"key": _fields(record), **await self._limit(record, limit)}

    async def _limit(self, key: KeyRecord, limit: tuple[int, str] | None) -> dict[str, Any]:
        """Set what a key may spend, where that is given."""
        return (
            {} if limit is None else {"budget": _budget(await self._gateway.store.set_budget(f"key:{key.id}", *limit))}
        )

    async def _revoke_key(self, call: _Call) -> Any:
        return {"key": _fields(await self._gateway.store.revoke_key(call.name))}

    async def _budgets(self, call: _Call) -> Any:
        return {"budgets": _rows(await self._gateway.store.budgets(), _budget)}

    async def _set_budget(self, call: _Call) -> Any:
        nano, period = _limit_of("limit_usd", call.body.get("limit_usd")), call.text("period", "total")
        store = self._gateway.store
        return _budget(await store.set_budget(await store.named_subject(call.text("subject")), nano, period))

    async def _remove_budget(self, call: _Call) -> Any:
        return {"removed": await self._gateway.store.remove_budget(call.name, call.query.get("period", "total"))}

    async def _providers(self, call: _Call) -> Any:
        return {"deployments": self._gateway.note_states()}

    async def _strategies(self, call: _Call) -> Any:
        lanes = self._gateway.runtime.decider.lanes
        found = [
            {
                "name": name,
                "strategy": lane.strategy.name,
                "is_default": name == self._gateway.config.default,
                "needs_vector": lane.strategy.needs_vector,
                "reads_answers": lane.strategy.reads_answers,
                "learns": lane.learns,
                "knob": lane.strategy.knob,
                "timeout_s": lane.timeout_s,
                "config": redacted(to_dict(lane.strategy.config)),
            }
            for name, lane in lanes.items()
        ]
        return {"strategies": found}

    async def _add_model(self, call: _Call) -> Any:
        """``POST /admin/models/NAME``: a model of the config joins the fitted routers that are served."""
        if unknown := set(call.body) - {"strategies", "outcomes"}:
            raise wrong(min(unknown), f"there is no {min(unknown)[:40]!r}; known: strategies, outcomes")
        names = call.body.get("strategies", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise wrong("strategies", "strategies must be a list of names")
        try:
            outcomes = await in_thread(_outcomes, call.body.get("outcomes"))
            done = await self._gateway.add_model(call.name, strategies=names, outcomes=outcomes)
        except CapacityError as error:
            raise unavailable(error) from None
        except AnabranchError as error:
            raise ApiError(400, "invalid_value", words(error)) from None
        if self._on_reload is None:
            await self._gateway.reload(self._gateway.config)
        else:
            await self._reload(call)
        return {"model": call.name, **_fields(done)}

    async def _explain(self, call: _Call) -> Any:
        """Why a request would go where it would; the body is one of chat."""
        try:
            decision = await self._gateway.explain(call.body)
        except BypassError as error:
            raise ApiError(409, "bypassed", words(error)) from None
        return {**_fields(decision), "candidates": _rows(decision.candidates), "details": dict(decision.details)}

    async def _decisions(self, call: _Call) -> Any:
        rows = await self._gateway.store.decisions(call.name or None, call.number("limit", 100))
        if call.name and not rows:
            raise ApiError(404, "unknown_request", f"no decision is kept for {call.name[:80]!r}")
        return {"decisions": _rows(rows)}

    async def _feedback(self, call: _Call) -> Any:
        rows = await self._gateway.store.feedbacks(call.name or None, call.number("limit", 100))
        compared = await self._gateway.store.preferences(call.name or None, call.number("limit", 100))
        return {"feedback": _rows(rows), "preferences": _rows(compared)}

    async def _ledger(self, call: _Call) -> Any:
        names = ("request_id", "key_id", "user", "team", "tag", "model", "strategy", "status", "parent_id")
        wanted: dict[str, Any] = {name: call.query[name] for name in names if name in call.query}
        if "before_seq" in call.query:
            wanted["before_seq"] = call.number("before_seq", 1, 2**62)
        if "calls" in call.query:
            wanted["calls"] = call.flag("calls")
        rows = await self._gateway.store.ledger(LedgerQuery(limit=call.number("limit", 100), **wanted))
        return {"rows": _rows(rows)}

    async def _spend(self, call: _Call) -> Any:
        by = call.query.get("by", "model").split(",")
        if unknown := [name for name in by if name not in GROUPS]:
            raise wrong("by", f"by is {unknown[0][:40]!r}; it takes {', '.join(GROUPS)}")
        since = call.number("days", 30, 36_500) * 86_400
        store = self._gateway.store
        called = {key.id: key.name for key in await store.keys()} if "key" in by else {}
        rows = await store.spend(by, since_s=self._gateway.now_s() - since)

        def told(row: Spend) -> dict[str, Any]:
            name = {"key_name": called.get(row.group[by.index("key")], "")} if "key" in by else {}
            return {**_fields(row), **name, "cost_usd": dollars(row.cost_nano)}

        return {"spend": _rows(rows, told)}

    async def _clear(self, call: _Call) -> Any:
        try:
            # First, so that those on this machine have done it whatever becomes of Redis.
            deleted = await self._clear_here(call.name)
        finally:
            if self._gateway.shared is not None:
                await self._clear_shared(self._gateway.shared, call.name or None)
                # Meanwhile a request may have taken an answer out of Redis.
                await self._clear_here(call.name)
        return {"deleted": deleted}

    async def _clear_here(self, name: str) -> int:
        """Forget what this process and its workers hold of a key, "" for all; how many answers there were."""
        deleted = self._gateway.caches.forget(name or None)
        if self._peers is not None:
            deleted += sum(int(answer) for answer in (await self._peers.ask("clear", name)).values())
        return deleted

    async def _clear_shared(self, shared: Shared, tenant: str | None) -> None:
        try:
            await shared.clear(tenant)
        except AwayError:
            message = (
                "this gateway and its workers have deleted theirs, but what processes share (Redis) does not answer: its answers, and "
                "those that other gateways hold, are still there; try again"
            )
            raise ApiError(503, "shared_unavailable", message, headers={"Retry-After": "1"}) from None

    async def _ic_cache(self, call: _Call) -> Any:
        """``forget``: erase examples of one request, of a key or a user of it, or all."""
        if call.name != "forget":
            raise ApiError(404, "not_found", f"there is no /admin/ic-cache/{call.name[:40]}; there is forget")
        order = await self._order(call)
        try:
            num_examples, num_texts = await self._gateway.erasures.order(**order)
        except NotForgottenError as error:
            raise ApiError(503, "not_forgotten", str(error), headers={"Retry-After": "5"}) from None
        return {"forgotten": num_examples, "texts": num_texts}

    async def _order(self, call: _Call) -> dict[str, Any]:
        body, known = call.body, ("request_id", "key", "user", "all")
        if unknown := set(body) - set(known):
            raise wrong(min(unknown), f"there is no {min(unknown)!r}; known: {', '.join(known)}")
        given = [name for name in ("request_id", "key", "all") if name in body]
        if len(given) != 1 or ("user" in body and "key" not in body) or body.get("all", True) is not True:
            raise wrong("body", "give one of request_id, key (and a user of it, if only those are meant) and all: true")
        if "request_id" not in body:
            user, key = call.text("user") if "user" in body else None, call.text("key")
            # "" is whoever came without a key.
            tenant = key_rows.meant(await self._gateway.store.keys(), key).id if key else key
            return {"tenant": tenant if "key" in body else None, "user": user}
        id = call.text("request_id")
        rows = await self._gateway.store.decisions(id, 1)
        decision = rows[0].body.get("details", {}).get("id") if rows else None
        if not isinstance(decision, str):
            if not await self._gateway.store.ledger(LedgerQuery(request_id=id)):
                raise ApiError(404, "unknown_request", f"there is no request {id[:80]!r}", param="request_id")
            # It has no examples; what was asked and answered goes.
            decision = id
        return {"tenant": None, "decision": decision, "request_id": id}

    async def _config(self, call: _Call) -> Any:
        return redacted(to_dict(self._gateway.config))

    async def _reload(self, call: _Call) -> Any:
        if self._on_reload is None:
            raise ApiError(
                409, "no_config", "the gateway was started without a config file, so there is nothing to read again"
            )
        try:
            await self._on_reload()
        except PeerError as error:
            raise ApiError(409, "reload_failed", f"not every worker uses the new config: {error}") from None
        except AnabranchError as error:
            raise ApiError(409, "reload_failed", f"the old config stays: {words(error)}") from None
        return {"status": "reloaded", "models": len(self._gateway.config.models)}


def _fields(record: Any) -> dict[str, Any]:
    """A record as JSON has it, whose own fields may hold another (a price), and much that is JSON already.

    `dataclasses.asdict` copies all of that in one go.
    """
    found = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return {name: _plain(value) for name, value in found.items()}


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _rows(rows: Sequence[T], told: Callable[[T], dict[str, Any]] = _fields) -> Rows | list[dict[str, Any]]:
    """What is told of each; many are made while they are written."""
    return [told(row) for row in rows] if len(rows) <= AT_ONCE else Rows(lambda: map(told, rows))


def _outcomes(rows: Any) -> Recorded | None:
    """Outcomes of a body, each as a line of a file of them. Raises DataError that says which is wrong."""
    if rows is None:
        return None
    if not isinstance(rows, list) or not rows:
        raise wrong("outcomes", "outcomes must be a list of objects with query and scores, at least one")
    read = []
    for place, row in enumerate(rows):
        try:
            read.append(row_of(json.dumps(row)))
        except DataError as error:
            raise DataError(f"outcomes.{place}: {error}") from None
    return gather(read, Path("outcomes"), None)


def _budget(budget: Budget) -> dict[str, Any]:
    return {
        **_fields(budget),
        "remaining_nano": budget.remaining_nano,
        "limit_usd": dollars(budget.limit_nano),
        "spent_usd": dollars(budget.spent_nano),
    }


def _limit_of(name: str, value: Any) -> int:
    """Nano-dollars of an amount in a body. Raises ApiError."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong(name, f"{name} must be an amount of dollars")
    try:
        nano = nano_dollars(value)
    except InputError as error:
        raise wrong(name, f"{name}: {words(error)}") from None
    if nano < 0:
        raise wrong(name, f"{name} is {value!r:.40}; it must be 0 or more")
    return nano


def _key_fields(body: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, str] | None]:
    """Fields of a key, and what it may spend in which period, if that is given. Raises ApiError for one that keys do not have."""
    if unknown := set(body) - set(FIELDS) - set(BUDGET):
        raise wrong(min(unknown), f"a key has no {min(unknown)[:40]!r}; known: {', '.join(sorted((*FIELDS, *BUDGET)))}")
    fields = {name: value for name, value in body.items() if name not in BUDGET}
    if "budget_usd" not in body:
        if "period" in body:
            raise wrong("period", "period goes with budget_usd, what may be spent in it")
        return fields, None
    # Before a key is made that would be without its limit.
    period = body.get("period", "total")
    if period not in PERIODS:
        raise wrong("period", f"period is {period!r:.40}; it must be one of {', '.join(PERIODS)}")
    return fields, (_limit_of("budget_usd", body["budget_usd"]), period)


async def _told(work: Awaitable[T]) -> T:
    """What the store does. A value that it refuses is told with its field, which the sentence begins with."""
    try:
        return await work
    except UnknownKeyError:
        raise
    except InputError as error:
        field = words(error).split(" ", 1)[0]
        raise wrong(field, words(error)) if field in FIELDS else ApiError(400, "invalid_value", words(error)) from None
