"""Who may see and do what operators do: whoever has the admin key or a key of the store that is an admin's.

Where there is no admin key, whoever sits at this machine may look at the page, and nothing more.
"""

import base64
import binascii
import hmac
import ipaddress

from aiohttp import web

from anabranch.gateway.gateway import Gateway
from anabranch.web.answers import JSON, bearer
from anabranch.web.api_error import ApiError
from anabranch.web.senders import is_meant, is_same_origin, told

# Of an answer to a request that no request of a model was made of.
IS_EARLY = web.ResponseKey("is_early", bool)

# Of a request: the id of the key of the store that it came with, for the access log.
KEY_ID = web.RequestKey("key_id", str)

# Types that any page may send, without asking first; nothing is sent as one of them without a body either.
_SIMPLE = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data")
_ASK = {"WWW-Authenticate": 'Basic realm="gateway, any name, the admin key as password", charset="UTF-8"'}


async def check_operator(gateway: Gateway, request: web.BaseRequest, *, local: bool) -> None:
    """Raises ApiError unless the request may see what operators see.

    Args:
        gateway: with the admin key, if there is one.
        request: with the key as bearer token or as password.
        local: let requests from this machine in where there is no admin key.
    """
    key, given = gateway.admin_key, _password(request) or bearer(request) or ""
    if key is None and local and _is_local(request):
        return
    if key is not None and hmac.compare_digest(given.encode("utf-8", "replace"), key.encode()):
        return
    record = await gateway.store.key_of(given) if given else None
    if record is not None:
        request[KEY_ID] = record.id
    if record is not None and record.is_admin:
        return
    if key is None and not given:
        raise ApiError(
            403, "admin_closed", "there is no admin key; set admin.key in the config, or make a key with --admin"
        )
    raise ApiError(401, "wrong_admin_key", "this needs the admin key", headers=_ASK)


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
    except ValueError:
        return False
    forwarded = any(name in request.headers for name in ("forwarded", "x-forwarded-for", "x-real-ip"))
    return is_near and is_meant(told(request.headers, "host") or "") and not forwarded


def check_origin(request: web.BaseRequest) -> None:
    """Raises ApiError for a change that another page makes a browser send, which knows the key, and for one that is no JSON.

    A page of another host can send a form or plain text anywhere, without asking; JSON it cannot.
    """
    if request.method in ("GET", "HEAD"):
        return
    headers = request.headers
    is_foreign = told(headers, "sec-fetch-site") not in (None, "same-origin", "none")
    if is_foreign or not is_same_origin(told(headers, "origin"), told(headers, "host") or ""):
        raise ApiError(
            403, "foreign_origin", "a page of another host asks for this; use one of this host, or no browser"
        )
    kind = (headers.get("content-type") or "").partition(";")[0].strip().lower()
    is_wrong = kind != JSON if request.body_exists else kind in _SIMPLE
    if is_wrong and request.method != "DELETE":
        raise ApiError(415, "unsupported_media_type", "send application/json as content-type")
