"""Rows of the ledger, as the table has them and as they are told."""

from collections.abc import Sequence
from typing import Any, cast

from anabranch.gateway.store import schema
from anabranch.gateway.store.database import Row
from anabranch.gateway.store.records import LedgerRow, clean, joined, parted
from anabranch.routers.money import Price


def owners(subjects: Sequence[str]) -> dict[str, Any]:
    """Fields of a ledger row that say whose it was."""
    found: dict[str, list[str]] = {"key": [], "user": [], "team": [], "tag": []}
    for subject in subjects:
        scope, _, name = subject.partition(":")
        if scope in found:
            found[scope].append(name)
    return {
        "key_id": "".join(found["key"]),
        "user": "".join(found["user"]),
        "team": "".join(found["team"]),
        "tags": tuple(found["tag"]),
    }


def ledger_values(row: LedgerRow) -> Row:
    """A row as the table has it, in the order of `schema.LEDGER`."""
    price = row.price
    return (
        row.request_id,
        row.ts_us,
        clean(row.key_id),
        clean(row.user),
        clean(row.team),
        joined(row.tags),
        clean(row.requested),
        clean(row.strategy),
        joined(row.candidates),
        clean(row.model),
        clean(row.deployment),
        row.attempts,
        row.prompt_tokens,
        row.completion_tokens,
        row.cached_tokens,
        int(row.is_estimated),
        None if price is None else price.input,
        None if price is None else price.output,
        None if price is None else price.cached_input,
        row.cost_nano,
        row.reserved_nano,
        row.latency_us,
        row.first_token_us,
        row.overhead_us,
        row.status,
        clean(row.code),
        row.cache,
        joined(row.flags),
        row.parent_id,
        row.purpose,
        row.calls,
        row.calls_nano,
    )


def read_ledger(row: Row) -> LedgerRow:
    """The opposite, with ``seq`` before and ``quality`` behind."""
    seq, *values, quality = row
    named: dict[str, Any] = dict(zip(schema.LEDGER, values, strict=True))
    price_input, price_output = named.pop("price_input"), named.pop("price_output")
    cached = named.pop("price_cached")
    price = (
        None if price_input is None else Price(input=price_input, output=cast(int, price_output), cached_input=cached)
    )
    for name in ("tags", "candidates", "flags"):
        named[name] = parted(named[name])
    named["user"], named["is_estimated"] = named.pop("owner"), bool(named["is_estimated"])
    return LedgerRow(**named, price=price, seq=seq, quality=quality)
