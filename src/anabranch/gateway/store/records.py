"""What a store keeps: keys, budgets, reservations, ledger rows. Money is nano-dollars, time microseconds since 1970 (UTC), all integers."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anabranch.errors import InputError
from anabranch.gateway.store.period import Period
from anabranch.routers.money import Price

GLOBAL = "global"

# The tag of what `anabranch gateway collect` asks; no user and no key may carry it.
COLLECT = "collect"

# That of what strategies ask beside requests, to learn, and that of what a gateway asks beside them of the other models.
LEARNING = "learning"
SHADOW = "shadow"
OUR_TAGS = frozenset((COLLECT, LEARNING, SHADOW))
SCOPES = ("key", "user", "team", "tag")
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@/+=-]{0,63}")

# A tag that is its sender's own word, see `speaking`.
OWN_TAG = re.compile(rf"(k[0-9a-f]{{12}}|anonymous)/{TAG.pattern}")

# Characters of a text in the ledger; more are cut off.
TEXT = 256

# Characters of somebody's name.
NAME = 200
MAX_TAGS = 16


def clean(text: str, most: int = TEXT) -> str:
    """``text`` as every database takes it: no NUL, no half of a surrogate pair, cut to ``most`` characters."""
    text = text[:most]
    if text.isascii() and "\0" not in text:
        return text
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


def plain(text: str) -> str:
    """A name of somebody as subjects carry it: without commas and what cannot be seen."""
    return "".join(sign if sign.isprintable() and sign != "," else ";" for sign in clean(text, NAME).strip())


def listed(what: str, items: Any) -> tuple[str, ...]:
    """``items``, a list of texts. Raises InputError, also for a text in its place, which would be taken letter by letter."""
    if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
        raise InputError(f"{what} is {items!r:.100}; it must be a list of texts")
    found = tuple(items)
    for item in found:
        if not isinstance(item, str):
            raise InputError(f"{what} has {item!r:.100}; it must be a list of texts")
    return found


def check_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """Tags, each once, in order. Raises InputError for one that may not be, or too many."""
    found = tuple(dict.fromkeys(listed("tags", tags)))
    for tag in found:
        if not TAG.fullmatch(tag):
            raise InputError(
                f"the tag {tag!r} may not be: 1 to 64 of letters, digits and _ . @ / + = -, a letter or digit first"
            )
    if len(found) > MAX_TAGS:
        raise InputError(f"{len(found)} tags are too many; {MAX_TAGS} at most")
    return found


def check_subject(subject: str) -> str:
    """``subject`` if it is one. Raises InputError."""
    scope, mark, name = subject.partition(":")
    if subject == GLOBAL:
        return subject
    if mark and scope in SCOPES and plain(name) and len(name) <= NAME:
        if scope == "tag":
            return subject if OWN_TAG.fullmatch(name) else f"tag:{check_tags([name])[0]}"
        return f"{scope}:{plain(name)}"
    raise InputError(f"a budget is for {subject!r}; it must be global, key:ID, user:NAME, team:NAME or tag:NAME")


class SaidBeforeError(InputError):
    """A key has scored a request before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    """A key of this gateway. The key itself is kept nowhere, only its SHA-256.

    Attributes:
        id: names it in ledgers and budgets; no secret.
        name: for people.
        hint: its last four characters.
        user, team: whose it is; empty if nobody's.
        tags: that every request with it carries.
        models: names it may use; empty for all.
        rpm, tpm: requests and tokens a minute; None takes the gateway's.
        max_in_flight: requests at a time; None takes the gateway's.
        speaks_for: whose users and tags its requests may name, beside its own; empty takes the gateway's. See `speaking`.
        is_admin: opens the admin interface too.
        created_us, expires_us, revoked_us: None for never.
    """

    id: str
    name: str = ""
    hint: str = ""
    user: str = ""
    team: str = ""
    tags: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    rpm: int | None = None
    tpm: int | None = None
    is_admin: bool = False
    created_us: int = 0
    expires_us: int | None = None
    revoked_us: int | None = None
    max_in_flight: int | None = None
    speaks_for: tuple[str, ...] = ()

    @property
    def sender(self) -> str:
        """Whose requests may fail together for a reason of their own: ``team:NAME``, else ``user:NAME``, else ``key:ID``."""
        if self.team:
            return f"team:{self.team}"
        return f"user:{self.user}" if self.user else f"key:{self.id}"

    def is_valid(self, now_us: int) -> bool:
        """Neither revoked nor expired."""
        return self.revoked_us is None and (self.expires_us is None or now_us < self.expires_us)

    def allows(self, model: str) -> bool:
        """Whether it may use a model."""
        return not self.models or model in self.models


def subjects_of(key: KeyRecord | None = None, *, user: str = "", tags: Iterable[str] = ()) -> tuple[str, ...]:
    """Whose budgets a request counts against: everyone's, and those of its key, user, team and tags.

    Args:
        key: that it came with.
        user: that it names, as it may be taken (`speaking.spoken`); the key's own user goes before it.
        tags: that it has beside the key's, likewise.

    Raises InputError for a tag that may not be.
    """
    found = [GLOBAL]
    if key is not None:
        found.append(f"key:{key.id}")
        user, tags = key.user or user, (*key.tags, *tags)
        if key.team:
            found.append(f"team:{key.team}")
    if plain(user):
        found.append(f"user:{plain(user)}")
    tags = tuple(dict.fromkeys(listed("tags", tags)))
    check_tags(tag for tag in tags if not OWN_TAG.fullmatch(tag))
    if len(tags) > MAX_TAGS:
        raise InputError(f"{len(tags)} tags are too many; {MAX_TAGS} at most")
    found += [f"tag:{tag}" for tag in tags]
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A limit on spending, and how it stands.

    ``spent_nano + reserved_nano <= limit_nano``, unless the limit was lowered, or a call cost more than was reserved for it.

    Attributes:
        id: of the row.
        subject: ``global``, ``key:ID``, ``user:NAME``, ``team:NAME`` or ``tag:NAME``.
        period: after which it begins anew.
        limit_nano: of a period.
        spent_nano: settled in this period.
        reserved_nano: by requests under way.
        window_us: when the period began.
        resets_us: when it ends; None if it never does.
    """

    id: int
    subject: str
    period: Period
    limit_nano: int
    spent_nano: int
    reserved_nano: int
    window_us: int
    resets_us: int | None

    @property
    def remaining_nano(self) -> int:
        """Neither spent nor reserved; never negative."""
        return max(0, self.limit_nano - self.spent_nano - self.reserved_nano)


@dataclass(frozen=True, slots=True)
class Reservation:
    """Money set aside for a request under way.

    Attributes:
        request_id: of the request.
        subjects: whose budgets hold it.
        nano: how much.
    """

    request_id: str
    subjects: tuple[str, ...]
    nano: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRow:
    """What became of one request, or of one call that a strategy made for it.

    Rows are never changed; one of a request that was taken for left behind gives way to what became of it.

    Attributes:
        request_id: unique.
        ts_us: when it ended; set by the store, so that the rows of a period add up to what budgets say was spent in it.
        key_id, user, team, tags: whose it was; of a request with a reservation, as its subjects say.
        requested: the name of the model that was asked for.
        strategy: that chose; empty if the sender named a model.
        candidates: models in the order they would be tried.
        model, deployment: that answered; empty if none did.
        attempts: calls made upstream.
        prompt_tokens, completion_tokens, cached_tokens: of all calls that are paid for.
        is_estimated: an upstream did not say, so tokens were counted here.
        price: of the model, as it was then.
        cost_nano: nano-dollars, without those of ``calls_nano``.
        reserved_nano: that were set aside, for all of it; written by the store.
        latency_us, first_token_us: from the request to the end of the answer, and to its first token; None if there was none.
        overhead_us: time spent in the gateway; None if not measured.
        status: ``ok``, ``error``, ``refused``, ``cancelled``, or ``crashed`` for a request that a stopped process left behind.
        code: of the error, if any.
        cache: which cache answered; empty if none.
        flags: what else is worth knowing: ``hedged``, ``stitched``, ``over_reserved`` (cost more than was reserved), ``capped`` (cost more
            than can be paid), ``recovered``, ``corrected`` (was settled as left behind before it ended).
        parent_id: of a call that a strategy made for a request: that request; empty for requests themselves.
        purpose: what such a call was for; empty for requests.
        calls, calls_nano: how many a strategy made for this request, and what they cost; written by the store.
        seq: its place in the ledger; set by the store.
        quality: mean score of its feedback; set by the store; None if nobody gave any.
    """

    request_id: str
    ts_us: int = 0
    key_id: str = ""
    user: str = ""
    team: str = ""
    tags: tuple[str, ...] = ()
    requested: str = ""
    strategy: str = ""
    candidates: tuple[str, ...] = ()
    model: str = ""
    deployment: str = ""
    attempts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    is_estimated: bool = False
    price: Price | None = None
    cost_nano: int = 0
    reserved_nano: int = 0
    latency_us: int | None = None
    first_token_us: int | None = None
    overhead_us: int | None = None
    status: str = "ok"
    code: str = ""
    cache: str = ""
    flags: tuple[str, ...] = ()
    parent_id: str = ""
    purpose: str = ""
    calls: int = 0
    calls_nano: int = 0
    seq: int | None = None
    quality: float | None = None

    @property
    def total_nano(self) -> int:
        """All that a request has cost."""
        return self.cost_nano + self.calls_nano


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerQuery:
    """Which rows; all that are given must fit.

    Attributes:
        since_us, until_us: of ``ts_us``, the second excluded.
        request_id, key_id, user, team, tag, model, strategy, status: as in the row.
        parent_id: calls that a strategy made for this request.
        calls: rows of such calls too; else, and without ``parent_id``, there is one row for each request.
        before_seq: rows before this place, to read on where a page ended.
        limit: most rows.
        newest_first: the order.
    """

    since_us: int | None = None
    until_us: int | None = None
    request_id: str | None = None
    key_id: str | None = None
    user: str | None = None
    team: str | None = None
    tag: str | None = None
    model: str | None = None
    strategy: str | None = None
    status: str | None = None
    parent_id: str | None = None
    calls: bool = False
    before_seq: int | None = None
    after_seq: int | None = None
    limit: int = 100
    newest_first: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Spend:
    """Totals of a group of ledger rows.

    Attributes:
        group: values of what was grouped by.
        requests, errors: how many, and how many of them did not end ``ok``.
        calls: that strategies made for requests; a group by model may have nothing else.
        cost_nano: nano-dollars.
        prompt_tokens, completion_tokens, cached_tokens: sums.
    """

    group: tuple[str, ...]
    requests: int
    errors: int
    cost_nano: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    calls: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionRow:
    """Why a request went where it went.

    Attributes:
        request_id, ts_us: see `LedgerRow`.
        strategy, model: that chose, and that was chosen.
        body: what explains it, ready for JSON.
    """

    request_id: str
    ts_us: int
    strategy: str
    model: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class CollectedRow:
    """A call that collecting has paid for.

    Attributes:
        key: of what was asked of whom.
        ts_us: when the user asked whose request it is about: it is kept as long as that.
        body: what came of it, ready for JSON.
    """

    key: str
    ts_us: int
    body: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackRow:
    """What somebody said of an answer.

    Attributes:
        request_id: of the request.
        ts_us: when it was said.
        key_id: who said it.
        score: larger is better.
        comment: in words.
    """

    request_id: str
    ts_us: int
    key_id: str
    score: float
    comment: str


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """Whose answer somebody preferred to whose.

    Attributes:
        request_id: of the request whose answer was one of the two.
        ts_us: when it was said.
        key_id: who said it.
        better, worse: models.
        comment: in words.
    """

    request_id: str
    ts_us: int
    key_id: str
    better: str
    worse: str
    comment: str


def joined(items: Sequence[str]) -> str:
    """A list of names as one text: ``,a,b,``; empty for none. Names hold no commas, or lose them."""
    return f",{','.join(clean(item).replace(',', ';') for item in items)}," if items else ""


def parted(text: str) -> tuple[str, ...]:
    """What `joined` made one."""
    return tuple(text[1:-1].split(",")) if text else ()
