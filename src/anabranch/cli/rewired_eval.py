"""``anabranch eval --rewire``: how well text is foretold while routers are turned to it, beside the same text without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anabranch.cli.output import fact, table
from anabranch.errors import ConfigError

if TYPE_CHECKING:
    from anabranch.adapters.rewiring import Rewiring
    from anabranch.cli.corpora import Tracked
    from anabranch.lm import Decoder


def check_first(first: int | None, rewiring: Rewiring | None) -> None:
    """Raises ConfigError for --rewire-after without --rewire."""
    if first is not None and rewiring is None:
        raise ConfigError("--rewire-after is given, but --rewire is not; give both")


def first_of(length: int, first: int | None, rewiring: Rewiring) -> int:
    """Tokens of a window of ``length`` that are read before routers are turned. Raises ConfigError where that leaves nothing to measure."""
    found = first or rewiring.interval or length // 2
    if not 1 <= found < length:
        said = "--rewire-after" if first else "the interval of --rewire, where --rewire-after says nothing else"
        raise ConfigError(
            f"windows have {length} tokens, of which {found} are read before routers are turned ({said}), so nothing is left to measure; "
            "use a longer --sequence-length, or fewer tokens"
        )
    return found


def compare(network: Decoder, rewiring: Rewiring, windows: Tracked, first: int) -> dict[str, Any]:
    """See `anabranch.adapters.rewiring.scored.Comparison.to_dict`, with the settings; each window is a text of its own.

    ``too_short`` are windows with nothing to measure, at the ends of texts. Raises ConfigError where all are, for a model without routers
    of experts, or through which no gradient comes.
    """
    from anabranch.adapters.rewiring import Rerouter
    from anabranch.adapters.rewiring.scored import Comparison
    from anabranch.config import to_dict

    rerouter, found = Rerouter(network, rewiring), Comparison(windows.domains)
    too_short = longest = 0
    for batch in windows:
        longest = max(longest, batch.token_BL.shape[1])
        # The ends of texts are.
        if batch.token_BL.shape[1] <= first:
            too_short += len(batch.token_BL)
            continue
        found.add(rerouter.score(batch.token_BL, first=first), batch.domain_B)
    if longest <= first:
        raise ConfigError(
            f"the longest text has {longest} tokens, of which {first} are read before routers are turned, so nothing is left to measure; "
            "give longer text, or a smaller --rewire-after"
        )
    about = {"settings": to_dict(rewiring), "routers": list(rerouter.names), "after": first, "too_short": too_short}
    return {**about, **found.to_dict()}


def show(found: dict[str, Any]) -> None:
    """What `compare` found, for people."""
    own = found["settings"]
    each = "once" if own["interval"] is None else f"and again after each {own['interval']}"
    fact("rewire", f"behind {found['after']} tokens of each window, {each}: {own['steps']} steps of {own['eta']:g}")
    rows = [*found.get("by_domain", {}).items(), ("all", found)]
    table(
        ["nats/token", "as it is", "rewired", "difference", "standard\nerror", "tokens", "windows"],
        [[name, *_numbers(part), f"{part['tokens']:,}", f"{part['texts']:,}"] for name, part in rows],
    )
    print()
    table(
        ["tokens read", "as it is", "rewired", "difference", "standard\nerror", "steps", "kept", "overlap"],
        [
            [str(phase["read"]), *_numbers(phase), f"{phase['steps']:.1f}", _kept(phase), _share(phase["overlap"])]
            for phase in found["phases"]
        ],
    )
    skipped: dict[str, int] = {}
    for phase in found["phases"]:
        for reason, count in phase["skipped"].items():
            skipped[reason] = skipped.get(reason, 0) + count
    for reason, count in skipped.items():
        fact("note", f"routers were not turned {count:,} times: {reason}")


def _numbers(part: dict[str, Any]) -> list[str]:
    error = part["standard_error"]
    means = [f"{part[name]:.4f}" for name in ("plain", "rewired")]
    return [*means, f"{part['difference']:+.4f}", "-" if error is None else f"{error:.4f}"]


def _kept(phase: dict[str, Any]) -> str:
    """Shares of the windows in which the guard took all of the change, or half."""
    kept = phase["kept"]
    if kept is None:
        return "-"
    total = sum(kept.values())
    return f"{(kept['all'] + kept['half'] / 2) / total:.0%}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
