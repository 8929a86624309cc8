"""W3C trace context: ``traceparent`` and ``tracestate`` as they come in, and as upstreams are sent them.

    traceparent: 00-<trace id, 32 hex>-<id of the caller's span, 16 hex>-<flags, 2 hex>
    tracestate:  vendor=value,tenant@vendor=value

What breaks the rules is dropped and never passed on: a wrong ``traceparent`` with its ``tracestate``, a wrong ``tracestate`` alone.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SAMPLED = 0x01

# Of the state: vendors, and characters in all. Longer ones lose entries of more than `LONG` characters first, then those at the end.
MEMBERS, CHARACTERS, LONG = 32, 512, 128

_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_MEMBER = re.compile(
    r"(?P<key>[a-z][a-z0-9_\-*/]{0,255}|[a-z0-9][a-z0-9_\-*/]{0,240}@[a-z][a-z0-9_\-*/]{0,13})"
    r"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """The trace that a request belongs to.

    Attributes:
        trace_id: 32 hexadecimal digits.
        span_id: of this request, 16.
        parent_id: of the caller's span; "" if the trace begins here.
        is_sampled: the caller records it, or, where it begins here, we do.
        state: of vendors, as ``tracestate`` has it; "" for none.
    """

    trace_id: str
    span_id: str
    parent_id: str = ""
    is_sampled: bool = False
    state: str = ""

    def headers(self, span_id: str) -> dict[str, str]:
        """What an upstream is sent by the call whose span is ``span_id``."""
        parent = f"00-{self.trace_id}-{span_id}-{SAMPLED if self.is_sampled else 0:02x}"
        return {"traceparent": parent, "tracestate": self.state} if self.state else {"traceparent": parent}


def new_span_id() -> str:
    """16 hexadecimal digits that are not all 0."""
    return f"{int.from_bytes(os.urandom(8)) or 1:016x}"


def new_trace(*, is_sampled: bool) -> Trace:
    """One that begins here."""
    return Trace(trace_id=f"{int.from_bytes(os.urandom(16)) or 1:032x}", span_id=new_span_id(), is_sampled=is_sampled)


def trace_of(headers: Mapping[str, str]) -> Trace | None:
    """The trace that a request came with; None if it came with none, or with one that breaks the rules.

    Args:
        headers: names in lower case, or a mapping that does not mind; one with ``getall`` may have a name several times.
    """
    parents = _all(headers, "traceparent")
    found = _PARENT.fullmatch(parents[0].strip(" \t")) if len(parents) == 1 else None
    if found is None:
        return None
    version, trace_id, parent_id, flags, rest = found.groups()
    # Later versions may have more behind a dash; this one has nothing.
    if version == "ff" or (version == "00" and rest is not None) or not trace_id.strip("0") or not parent_id.strip("0"):
        return None
    return Trace(
        trace_id=trace_id,
        span_id=new_span_id(),
        parent_id=parent_id,
        is_sampled=bool(int(flags, 16) & SAMPLED),
        state=_state(_all(headers, "tracestate")),
    )


def _all(headers: Mapping[str, str], name: str) -> list[str]:
    getall: Any = getattr(headers, "getall", None)
    if getall is not None:
        return list(getall(name, ()))
    value = headers.get(name)
    return [] if value is None else [value]


def _state(lines: list[str]) -> str:
    """Entries of all lines in their order; "" if one is wrong."""
    members = [member for line in lines for one in line.split(",") if (member := one.strip(" \t"))]
    keys = set()
    for member in members:
        found = _MEMBER.fullmatch(member)
        if found is None or found["key"] in keys:
            return ""
        keys.add(found["key"])
    if len(members) > MEMBERS:
        return ""
    return ",".join(_shortened(members))


def _shortened(members: list[str]) -> list[str]:
    while sum(map(len, members)) + len(members) - 1 > CHARACTERS:
        at = next((at for at in reversed(range(len(members))) if len(members[at]) > LONG), len(members) - 1)
        members = members[:at] + members[at + 1 :]
    return members
