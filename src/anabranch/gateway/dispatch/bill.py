"""What a call costs: a price list, what the provider said of the call, and what was asked of it, as nano-dollars. Never below the bill.

Where the provider says nothing, what was asked decides, at the dearest that it may be: a prompt that asks to be cached was written to the
cache, tokens of an answer that may be sound were sound. Where it says what the call costs, that counts if it is more.
"""

from dataclasses import replace

from anabranch.gateway.providers.usage import Usage
from anabranch.routers.money import CHEAPER, Price


def bill(price: Price, usage: Usage, asked: Usage | None = None, *, writes: bool = False) -> int:
    """Nano-dollars of a call, rounded up.

    Args:
        price: of the deployment.
        usage: as the provider said, or as it was counted or feared here.
        asked: the most that the call may come to, with the tier and the searches that were asked for; None if nobody said.
        writes: the provider puts prompts into its cache, and bills that, without being asked to.
    """
    if asked is not None:
        usage = _feared(usage, asked, writes)
    elif usage.is_estimated and writes:
        usage = replace(usage, cache_write=usage.prompt - usage.cached)
    if usage.is_estimated and usage.tier in CHEAPER:
        # It was asked for; whether it was given, nobody has said.
        usage = replace(usage, tier="")
    searches = usage.searches or 0
    calls = 1 if usage.calls is None else usage.calls
    told, named = usage.nano or 0, price.of_tier(usage.tier)
    if named is not None:
        return max(told, named.cost_of(usage.tokens, searches, calls))
    # A tier whose price is not known; none that is can be too much.
    return max(told, *(tier.cost_of(usage.tokens, searches, calls) for tier in price.all_tiers()))


def _feared(usage: Usage, asked: Usage, writes: bool) -> Usage:
    """``usage`` with what the provider did not say as dear as it was asked for."""
    changes: dict[str, object] = {}
    if not usage.tier and asked.tier and asked.tier not in CHEAPER:
        changes["tier"] = asked.tier
    if asked.searches and (usage.searches is None or usage.is_estimated):
        changes["searches"] = max(asked.searches, usage.searches or 0)
    written = usage.cache_write + usage.cache_write_1h
    if asked.cache_write_1h and written and not usage.tells_ttl:
        changes |= {"cache_write": 0, "cache_write_1h": written}
    if usage.is_estimated and usage.calls is None:
        changes["calls"] = asked.calls
    if usage.is_estimated:
        fresh = usage.prompt - usage.cached
        if asked.cache_write_1h:
            changes |= {"cache_write": 0, "cache_write_1h": fresh}
        elif asked.cache_write or writes:
            changes["cache_write"] = fresh
        kinds = (
            ("audio_input", usage.prompt),
            ("image_input", usage.prompt),
            ("audio_output", usage.completion),
            ("image_output", usage.completion),
        )
        for name, whole in kinds:
            changes[name] = max(getattr(usage, name), min(getattr(asked, name), whole))
    return replace(usage, **changes) if changes else usage  # type: ignore[arg-type]


def is_unpriced(price: Price, usage: Usage) -> bool:
    """The provider said a tier whose price is not known."""
    return price.of_tier(usage.tier) is None and not usage.nano
