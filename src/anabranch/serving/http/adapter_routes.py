"""``/v1/adapters``: which adapters there are; they come and go while requests are answered."""

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Coroutine
from typing import Any, TypeVar
from urllib.parse import unquote

from aiohttp import web

from anabranch.errors import (
    AnabranchError,
    CapacityError,
    CheckpointError,
    ConfigError,
    DataError,
    InputError,
    NotFiniteError,
)
from anabranch.serving.core.client import BusyError, CalledOffError
from anabranch.serving.core.mixture import check_name
from anabranch.serving.http.adapter_names import BASE, AdapterNames
from anabranch.serving.http.choice import ENGINE_FAILED
from anabranch.serving.http.config import HttpConfig
from anabranch.serving.http.context import RequestContext
from anabranch.serving.http.frontend import Frontend
from anabranch.serving.http.keys import is_token
from anabranch.web.answers import wrong_method
from anabranch.web.api_error import ApiError, wrong
from anabranch.web.body import said

__all__ = ["AdapterRoutes", "is_operator"]

logger = logging.getLogger(__name__)
PATH = "/v1/adapters"
_FIELDS = ("name", "folder")
# What may be wrong with a name or with what lies in a folder; anything else is no fault of who asks.
_OF_FOLDERS = (InputError, ConfigError, DataError, CheckpointError, NotFiniteError)
T = TypeVar("T")


class AdapterRoutes:
    """These routes.

    Args:
        frontend: whose engine has the adapters.
    """

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        # Changes under way, which go on where their sender has left.
        self._changes: set[asyncio.Task[Any]] = set()
        # How many loads of a name are under way; and which change of it was the last that was done, by a count, while any is under way.
        self._loading = Counter[str]()
        self._done: dict[str, int] = {}
        self._serial = itertools.count()

    @property
    def _names(self) -> AdapterNames:
        return self._frontend.adapters

    async def answer(self, context: RequestContext) -> web.StreamResponse:
        """``/v1/adapters`` and ``/v1/adapters/NAME``, for whoever `may_ask`. Raises ApiError."""
        raw = context.request.rel_url.raw_path[len(PATH) + 1 :]
        name = unquote(raw) if raw else None
        methods = (
            {"GET": self._list, "POST": self._load} if name is None else {"GET": self._get, "DELETE": self._remove}
        )
        work = methods.get(context.request.method)
        if work is None:
            raise wrong_method(context.request, methods)
        self._frontend.check_ready()
        if not self._names.is_there:
            raise ApiError(501, "not_supported", "this engine serves no adapters")
        return context.json(await work(context, name or ""))

    async def _list(self, context: RequestContext, name: str) -> dict[str, Any]:
        return {"object": "list", "data": [self._shown(facts) for facts in await self._control("adapters")]}

    async def _get(self, context: RequestContext, name: str) -> dict[str, Any]:
        found = next((facts for facts in await self._control("adapters") if facts["name"] == name), None)
        if found is None:
            raise _unknown(name)
        return self._shown(found)

    async def _load(self, context: RequestContext, name: str) -> dict[str, Any]:
        body = await context.body()
        unknown = next((field for field in body if field not in _FIELDS), None)
        if unknown is not None:
            raise wrong(unknown[:80], f"nobody knows {unknown:.80}; an adapter is loaded by {' and '.join(_FIELDS)}")
        try:
            name = check_name(body.get("name"))
        except InputError as error:
            raise wrong("name", str(error)) from None
        if name in self._frontend.names or name == BASE:
            raise wrong(
                "name", f"name is {name!r}, as the model without adapters is called; give the adapter another one"
            )
        if name in self._names.pinned:
            raise _pinned(name)
        folder = _folder_given(self._frontend.config, body.get("folder"))
        context.let_go()
        return self._shown(await self._whole(self._loaded(name, folder)))

    async def _loaded(self, name: str, folder: str) -> dict[str, Any]:
        number = next(self._serial)
        self._loading[name] += 1
        try:
            facts: dict[str, Any] = await self._control(
                "load_adapter", adapter=name, folder=folder, root=self._names.root
            )
        finally:
            self._loading -= Counter([name])
        # The engine may tell of an unloading that came later first.
        if self._done.get(name, -1) < number:
            self._done[name] = number
            self._names.folders[name], self._names.versions[name] = folder, facts["version"]
        return facts

    async def _remove(self, context: RequestContext, name: str) -> dict[str, Any]:
        if name in self._names.pinned:
            raise _pinned(name)
        if name not in self._names and name not in self._loading:
            raise _unknown(name)
        # From now on nobody is given it, whatever the engine is doing.
        self._names.folders.pop(name, None)
        self._names.versions.pop(name, None)
        self._done[name] = next(self._serial)
        facts = await self._whole(self._control("remove_adapter", adapter=name))
        return {**self._shown(facts), "deleted": True}

    async def _whole(self, change: Coroutine[Any, Any, T]) -> T:
        """What a change gives, which is done to its end also where whoever asked for it leaves: else the engine would have another
        adapter under the name than the server says, and gives to the next engine."""
        task = asyncio.ensure_future(change)
        self._changes.add(task)
        task.add_done_callback(self._changed)
        return await asyncio.shield(task)

    def _changed(self, task: "asyncio.Task[Any]") -> None:
        self._changes.discard(task)
        if not self._changes:
            self._done.clear()
        # An error that nobody waits for any more is none of the server's.
        if not task.cancelled():
            task.exception()

    async def _control(self, command: str, **arguments: Any) -> Any:
        """Raises ApiError for what cannot be done, by the server's fault or the operator's."""
        try:
            return await self._frontend.engine.control(command, **arguments)
        except ApiError:
            raise
        except BusyError as error:
            raise ApiError(503, "busy", str(error), headers={"Retry-After": "1"}) from None
        except CalledOffError as error:
            raise ApiError(409, "adapter_called_off", str(error)) from None
        except CapacityError as error:
            raise wrong("folder", str(error), "adapter_too_large") from None
        except _OF_FOLDERS as error:
            # What was to be unloaded, and is there no more.
            if command == "remove_adapter":
                raise _unknown(arguments["adapter"]) from None
            raise wrong("folder", str(error)) from None
        except AnabranchError as error:
            # Such as an engine that is gone: as for requests.
            logger.error("%s failed: %s", command, error)
            raise ApiError(500, "engine_failed", ENGINE_FAILED) from None

    def _shown(self, facts: dict[str, Any]) -> dict[str, Any]:
        """What is told of an adapter: nothing of where it lies beyond the root."""
        told = {name: value for name, value in facts.items() if name not in ("name", "folder")}
        return {"id": facts["name"], "object": "adapter", "parent": self._frontend.name, **told}


def is_operator(config: HttpConfig, bearer: str | None) -> bool:
    """Whether whoever comes with this secret may load and unload adapters.

    Raises ApiError: 401 without the admin token where there is one, 403 where callers have keys and there is none.
    """
    if config.admin_token is None:
        if config.api_keys:
            raise ApiError(
                403,
                "adapters_closed",
                "adapters are loaded with an admin token, which this server has not; set http.admin_token",
            )
        return True
    if not is_token(bearer, config.admin_token):
        raise ApiError(401, "wrong_admin_token", "this needs the admin token", headers={"WWW-Authenticate": "Bearer"})
    return True


def _folder_given(config: HttpConfig, given: Any) -> str:
    """The folder that a request names; where it lies is looked at where it is read, whenever it is, beside all that is answered.

    Raises ApiError: 403 where there is no root, 400 for what is no path.
    """
    if config.adapter_root is None:
        raise ApiError(403, "adapters_closed", "no folder may be loaded here; start the server with --adapter-root")
    if not isinstance(given, str) or not given or len(given) > 4096 or "\0" in given:
        raise wrong(
            "folder", f"folder is {said(given)}; it must be the path of a folder below the server's --adapter-root"
        )
    return given


def _unknown(name: str) -> ApiError:
    shown = name[:80] if name.isprintable() else "?"
    return ApiError(404, "adapter_not_found", f"there is no adapter {shown!r}; GET {PATH} lists what there is")


def _pinned(name: str) -> ApiError:
    return ApiError(409, "adapter_pinned", f"adapter {name!r} was given when the server started, and stays as it is")
