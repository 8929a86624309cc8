"""``/v1/admin/*``: what operators do. Closed unless the config has a token of its own for it."""

from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from anabranch.errors import InputError
from anabranch.serving.http.context import RequestContext
from anabranch.serving.http.frontend import Frontend
from anabranch.serving.http.keys import is_token
from anabranch.web.answers import wrong_method
from anabranch.web.api_error import ApiError, wrong
from anabranch.web.body import is_int, said

# Fields of a change of devices.
_SCALE = ("devices", "mode", "lost")
Work = Callable[[dict[str, Any]], Awaitable[Any]]


class Admin:
    """These routes.

    Args:
        frontend: whose engine is steered.
    """

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._table: dict[str, dict[str, Work]] = {
            "drain": {"GET": self._state, "POST": self._drain, "DELETE": self._resume},
            "scale": {"POST": self._scale},
            "cache": {"GET": self._cache, "DELETE": self._clear},
            "routes": {"GET": self._routes},
        }

    async def answer(self, context: RequestContext, name: str) -> web.StreamResponse:
        """``/v1/admin/NAME``. Raises ApiError."""
        token = self._frontend.config.admin_token
        if token is None:
            raise ApiError(404, "not_found", "the admin routes are closed; set http.admin_token to open them")
        if not is_token(context.bearer, token):
            raise ApiError(
                401, "wrong_admin_token", "this needs the admin token", headers={"WWW-Authenticate": "Bearer"}
            )
        methods = self._table.get(name)
        if methods is None:
            raise ApiError(
                404, "not_found", f"there is no admin route {name[:40]!r}; there are {', '.join(self._table)}"
            )
        work = methods.get(context.request.method)
        if work is None:
            raise wrong_method(context.request, methods)
        has_body = context.request.method == "POST" and context.request.body_exists
        return context.json(await work(await context.body() if has_body else {}))

    async def _state(self, body: dict[str, Any]) -> Any:
        gate = self._frontend.admission
        return {"state": self._frontend.state, "in_flight": gate.in_flight, "queued": gate.queued}

    async def _drain(self, body: dict[str, Any]) -> Any:
        """Take no more requests; those under way go on, and so does the process."""
        self._frontend.drain()
        return await self._state(body)

    async def _resume(self, body: dict[str, Any]) -> Any:
        self._frontend.resume()
        return await self._state(body)

    async def _scale(self, body: dict[str, Any]) -> Any:
        unknown = [name for name in body if name not in _SCALE]
        if unknown:
            raise wrong(
                unknown[0][:80], f"nobody knows {unknown[0]:.80}; a change of devices takes {', '.join(_SCALE)}"
            )
        devices, mode, lost = (body.get(name) for name in _SCALE)
        if devices is None or not is_int(devices) or not 1 <= devices <= 1024:
            raise wrong("devices", f"devices is {said(devices)}; it must be an integer from 1 to 1,024")
        if mode not in (None, "migrate", "drain"):
            raise wrong("mode", f"mode is {said(mode)}; it must be 'migrate' or 'drain'")
        if lost is not None and not isinstance(lost, list):
            raise wrong("lost", f"lost is {said(lost)}; it must be a list of numbers of devices that are gone")
        for place, device in enumerate(lost or ()):
            if not is_int(device) or device < 0:
                raise wrong("lost", f"lost[{place}] is {said(device)}; it must be the number of a device that is gone")
        given = {"devices": devices, "mode": mode, "lost": lost}
        told = {name: value for name, value in given.items() if value is not None}
        return {"result": await self._frontend.engine.control("scale", **told)}

    async def _cache(self, body: dict[str, Any]) -> Any:
        stats = self._frontend.engine.stats()
        self._frontend.metrics.absorb(stats)
        names = ("prompt_tokens", "cached_prompt_tokens")
        kept = {name: value for name, value in stats.counters.items() if name.startswith("expert_") or name in names}
        sizes = ("kv_usage_ratio", "expert_resident_bytes")
        made: dict[str, Any] = {**kept, **{name: value for name, value in stats.gauges.items() if name in sizes}}
        try:
            made["layers"] = await self._frontend.engine.control("expert_cache")
        except InputError:
            # An engine without a budget for its experts.
            made["layers"] = None
        return made

    async def _clear(self, body: dict[str, Any]) -> Any:
        return {"result": await self._frontend.engine.control("reset_prefix_cache")}

    async def _routes(self, body: dict[str, Any]) -> Any:
        """What the model routes: destinations of each layer, and how its experts did."""
        info, _ = self._frontend.check_ready()
        return {
            "model": self._frontend.name,
            "layers": {str(at): count for at, count in info.routed_layers.items()},
            "experts": {name: value for name, value in (await self._cache(body)).items() if name.startswith("expert_")},
        }
