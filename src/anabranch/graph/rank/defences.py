"""What a peer lets others do to it. Every field is a defence by itself, and each is measured in the study."""

from dataclasses import dataclass
from typing import Literal

from anabranch.bounds import shown
from anabranch.errors import InputError
from anabranch.graph.arguments import check_one_of, is_number

Saturation = Literal["cap", "log"] | None


@dataclass(frozen=True, kw_only=True)
class Defences:
    """Options of a peer, of the simulator and of `GRank`; the isolation constant F is their own argument.

    Attributes:
        saturation: what C clicks of one origin on one item for one term count: "cap" min(C, click_cap), "log" log(1 + C), None C, which
            is the paper's.
        click_cap: of "cap".
        min_common: m; an origin with fewer than m clicks in common with us has its similarity lowered to kappa_m / m of it.
        pull_only: rows nobody asked for are refused.
        rows_per_origin: only so many newest rows of an origin are kept and counted; None for all.
        ttl: rows older than this many seconds by the peer's clock (ticks in the simulator) no longer count; None for ever. Rows
            without a time stay.
        reply_rows: rows in one message at most; the rest comes with the next.
        reply_rows_per_origin: rows of one origin in one message at most.
        max_message_bytes: of a message, sent or taken; at least 262,144, so that any row fits.
        max_rows: rows in a log at most; further ones of others are refused.
        signed: rows without a valid Ed25519 signature of their origin are refused; needs the package ``cryptography``.
    """

    saturation: Saturation = "cap"
    click_cap: int = 3
    min_common: int = 0
    pull_only: bool = True
    rows_per_origin: int | None = 10_000
    ttl: float | None = None
    reply_rows: int = 10_000
    reply_rows_per_origin: int = 1_000
    max_message_bytes: int = 4 << 20
    max_rows: int = 1_000_000
    signed: bool = False

    def __post_init__(self) -> None:
        if self.saturation is not None:
            check_one_of("saturation", self.saturation, ("cap", "log"), ", or None")
        least = {"click_cap": 1, "min_common": 0, "reply_rows": 1, "reply_rows_per_origin": 1, "max_rows": 1}
        least |= {"max_message_bytes": 1 << 18}
        least |= {} if self.rows_per_origin is None else {"rows_per_origin": 1}
        for name, limit in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not limit <= value < 2**63:
                raise InputError(f"{name} is {shown(value)}; it is a whole number of at least {limit}, below 2**63")
        if self.ttl is not None and not (is_number(self.ttl) and 0 < self.ttl < float("inf")):
            raise InputError(f"ttl is {shown(self.ttl)}; it is a positive number of seconds, or None")


NONE = Defences(saturation=None, pull_only=False, rows_per_origin=None)
"""The paper's peer: every row counts, whoever sends it."""
