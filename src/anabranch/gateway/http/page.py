"""The page's routes. Who may see it: whoever has the admin key (as a password), or, where there is none, whoever sits at this machine."""

import base64
import binascii
import hmac
import ipaddress
from urllib.parse import urlsplit

from aiohttp import web

from anabranch.gateway.api_error import ApiError
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.openai import SAFE, Route, bearer
from anabranch.gateway.ui.page import CSP, asset, icon, render, render_parts

_ASK = {"WWW-Authenticate": 'Basic realm="gateway, any name, the admin key as password", charset="UTF-8"'}
_HEADERS = {
    **SAFE, "content-security-policy": CSP, "referrer-policy": "no-referrer", "x-frame-options": "DENY", "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin", "cross-origin-resource-policy": "same-origin",
}  # fmt: skip


def check_operator(gateway: Gateway, request: web.BaseRequest, *, local: bool) -> None:
    """Raises ApiError unless the request may see what operators see.

    Args:
        gateway: with the admin key, if there is one.
        request: with the key as bearer token or as password.
        local: let requests from this machine in where there is no admin key.
    """
    key = gateway.admin_key
    if key is None:
        if local and _is_local(request):
            return
        raise ApiError(403, "admin_closed", "there is no admin key; set admin.key in the config to open this")
    given = _password(request) or bearer(request) or ""
    if not hmac.compare_digest(given.encode("utf-8", "replace"), key.encode()):
        raise ApiError(401, "wrong_admin_key", "this needs the admin key", headers=_ASK)


class PageRoutes:
    """``/ui`` and what it loads."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def table(self) -> dict[str, dict[str, Route]]:
        """Route by path and method."""
        return {
            "/ui": {"GET": self._page},
            "/ui/": {"GET": self._page},
            "/ui/parts": {"GET": self._parts},
            "/ui/page.css": {"GET": _fixed(asset("page.css"), "text/css")},
            "/ui/page.js": {"GET": _fixed(asset("page.js"), "text/javascript")},
            "/ui/icon.svg": {"GET": _fixed(icon(), "image/svg+xml")},
        }

    async def _page(self, request: web.BaseRequest) -> web.StreamResponse:
        check_operator(self._gateway, request, local=True)
        return _html(render(await self._gateway.snapshot()))

    async def _parts(self, request: web.BaseRequest) -> web.StreamResponse:
        check_operator(self._gateway, request, local=True)
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


def _password(request: web.BaseRequest) -> str | None:
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _is_local(request: web.BaseRequest) -> bool:
    """It comes from this machine, and was meant for it: a name of another host that leads here (DNS rebinding) is none."""
    try:
        is_near = ipaddress.ip_address(request.remote or "").is_loopback
        host = urlsplit(f"//{request.host}").hostname or ""
        is_meant = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
    forwarded = any(name in request.headers for name in ("forwarded", "x-forwarded-for", "x-real-ip"))
    return is_near and is_meant and not forwarded
