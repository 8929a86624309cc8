"""What a sender may look up: the models, aliases and strategies that there are, and what is known of a key."""

from typing import Any

from anabranch.gateway.config import GatewayConfig, names_of
from anabranch.gateway.config.suggestions import hint
from anabranch.gateway.store import KeyRecord, Store
from anabranch.gateway.store.queries import spent_by_key
from anabranch.gateway.store.speaking import speaks_for
from anabranch.routers.money import dollars
from anabranch.web.api_error import ApiError

MONTH_S = 30 * 86_400.0


def listed_models(config: GatewayConfig, record: KeyRecord | None, since_s: float) -> list[dict[str, Any]]:
    """Models, aliases and strategies, as ``/v1/models`` lists them; of models, those alone that the key may use.

    Args:
        config: in use now.
        record: of the key; None for all models.
        since_s: when they were made, in seconds since 1970.
    """
    return [_fact(name, since_s) for name in _names(config, record)]


def listed_model(config: GatewayConfig, name: str, record: KeyRecord | None, since_s: float) -> dict[str, Any]:
    """One of `listed_models`. Raises ApiError (404)."""
    known = _names(config, record)
    if name not in known:
        message = f"there is no model {name[:80]!r}; {hint(name[:200], known)}"
        raise ApiError(404, "model_not_found", message, param="model")
    return _fact(name, since_s)


def _fact(name: str, since_s: float) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(since_s), "owned_by": "anabranch"}


def _names(config: GatewayConfig, record: KeyRecord | None) -> list[str]:
    closed = {
        name
        for model in config.models
        if record is not None and not record.allows(model.name)
        for name in (model.name, *model.aliases)
    }
    return [name for name in names_of(config) if name not in closed]


async def key_facts(store: Store, config: GatewayConfig, record: KeyRecord, now_s: float) -> dict[str, Any]:
    """What a key may know of itself: its limits, its own budgets, and what it has spent in the 30 days before ``now_s``."""
    since_us = int((now_s - MONTH_S) * 1e6)
    budgets = await store.budgets(f"key:{record.id}")
    count, nano = await store.look(lambda connection: spent_by_key(connection, record.id, since_us))
    limits = config.limits
    return {
        "object": "key",
        "id": record.id,
        "name": record.name,
        "user": record.user,
        "team": record.team,
        "tags": list(record.tags),
        "speaks_for": list(speaks_for(record, config.keys.speaks_for, has_keys=True)),
        "models": list(record.models),
        "rpm": record.rpm or limits.rpm,
        "tpm": record.tpm or limits.tpm,
        "max_in_flight": record.max_in_flight or limits.max_in_flight,
        "expires_s": None if record.expires_us is None else record.expires_us / 1e6,
        "last_30_days": {"requests": count, "spent_usd": dollars(nano)},
        "budgets": [
            {
                "period": one.period,
                "limit_usd": dollars(one.limit_nano),
                "spent_usd": dollars(one.spent_nano),
                "reserved_usd": dollars(one.reserved_nano),
                "remaining_usd": dollars(one.remaining_nano),
                "resets_s": None if one.resets_us is None else one.resets_us / 1e6,
            }
            for one in budgets
        ],
    }
