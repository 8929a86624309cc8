"""The page's routes."""

from aiohttp import web

from anabranch.errors import InputError
from anabranch.gateway.ab import results_of
from anabranch.gateway.collect.labels import Labels
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.access import check_operator, check_origin
from anabranch.gateway.logged_error import words
from anabranch.gateway.ui.ab import render_ab
from anabranch.gateway.ui.frame import CSP
from anabranch.gateway.ui.label import render_label
from anabranch.gateway.ui.page import asset, icon, render, render_parts
from anabranch.web.answers import SAFE, Route, json_response, read_body
from anabranch.web.api_error import ApiError, wrong
from anabranch.web.body import parse

# Of a verdict.
MOST_BYTES = 4096

_HEADERS = {
    **SAFE,
    "content-security-policy": CSP,
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class PageRoutes:
    """``/ui`` and what it loads."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def table(self) -> dict[str, dict[str, Route]]:
        """Route by path and method."""
        return {
            "/ui": {"GET": self._page},
            "/ui/ab": {"GET": self._tests},
            "/ui/label": {"GET": self._label, "POST": self._say},
            "/ui/label.js": {"GET": _fixed(asset("label.js"), "text/javascript")},
            "/ui/parts": {"GET": self._parts},
            "/ui/page.css": {"GET": _fixed(asset("page.css"), "text/css")},
            "/ui/page.js": {"GET": _fixed(asset("page.js"), "text/javascript")},
            "/ui/icon.svg": {"GET": _fixed(icon(), "image/svg+xml")},
        }

    async def _page(self, request: web.BaseRequest) -> web.StreamResponse:
        await check_operator(self._gateway, request, local=True)
        return _html(render(await self._gateway.snapshot()))

    async def _tests(self, request: web.BaseRequest) -> web.StreamResponse:
        await check_operator(self._gateway, request, local=True)
        return _html(render_ab(await results_of(self._gateway.store, self._gateway.config)))

    async def _label(self, request: web.BaseRequest) -> web.StreamResponse:
        """Two answers to be judged. They are texts of users: who looks must be an operator, from wherever."""
        await check_operator(self._gateway, request, local=False)
        labels = Labels(self._gateway.store)
        return _html(render_label(await labels.next(), *await labels.counts()))

    async def _say(self, request: web.BaseRequest) -> web.StreamResponse:
        await check_operator(self._gateway, request, local=False)
        check_origin(request)
        body = parse(await read_body(request, MOST_BYTES, self._gateway.config.limits.body_timeout_s))
        id, said = body.get("id"), body.get("verdict")
        if not isinstance(id, str) or not isinstance(said, str):
            raise wrong("id", "send id and verdict, both text")
        try:
            is_taken = await Labels(self._gateway.store).say(id, said)
        except InputError as error:
            raise wrong("verdict", words(error)) from None
        if not is_taken:
            raise ApiError(409, "not_waiting", "there is no such pair, or somebody has judged it already")
        return json_response({"id": id, "verdict": said})

    async def _parts(self, request: web.BaseRequest) -> web.StreamResponse:
        await check_operator(self._gateway, request, local=True)
        return _html(render_parts(await self._gateway.snapshot()))


def _html(text: str) -> web.Response:
    return web.Response(
        body=text.encode("utf-8", "replace"), content_type="text/html", charset="utf-8", headers=_HEADERS
    )


def _fixed(body: bytes, kind: str) -> Route:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        headers = {**_HEADERS, "cache-control": "max-age=300"}
        return web.Response(body=body, content_type=kind, charset="utf-8", headers=headers)

    return answer
