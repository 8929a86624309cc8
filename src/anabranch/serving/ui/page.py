"""The page as it is served, with headers that let it load and run nothing but itself."""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

_INLINE = re.compile(rb"<(style|script)>(.*?)</\1>", re.DOTALL)


@cache
def page() -> bytes:
    """HTML."""
    return files(__package__).joinpath("chat.html").read_bytes()


def _policy() -> str:
    hashes: dict[bytes, list[str]] = {b"style": [], b"script": []}
    for kind, text in _INLINE.findall(page()):
        hashes[kind].append(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'")
    allowed = {f"{kind.decode()}-src": " ".join(values) for kind, values in hashes.items()}
    rest = "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return f"default-src 'none'; style-src {allowed['style-src']}; script-src {allowed['script-src']}; {rest}"


HEADERS = {
    "content-security-policy": _policy(),
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "server": "anabranch",
}
