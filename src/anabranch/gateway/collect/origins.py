"""What the store holds of users' requests: questions that other models can be asked, and answers that need not be asked for."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anabranch.gateway.collect.calls import Messages, Said, call_key
from anabranch.gateway.core.decision_log import LONGEST_TEXT
from anabranch.gateway.store import OUR_TAGS, KeyRecord, LedgerQuery, LedgerRow
from anabranch.gateway.store.store import Store
from anabranch.routers.data.splits import question
from anabranch.routers.wording import normal_form

# Rows of the ledger read at a time.
PAGE = 500

# Settings that a whole answer is the same without.
_BOUNDS = {"max_tokens", "max_completion_tokens"}


@dataclass(frozen=True, slots=True)
class Origin:
    """A stored request.

    Attributes:
        request_id: of it.
        asked_us: when, in microseconds since 1970.
        query, task: as strategies see them.
        messages: the whole conversation, to ask another model with.
        key_id: of whoever asked.
        model: that answered.
        said: its answer, where one to the same question alone would have been the same.
    """

    request_id: str
    asked_us: int
    query: str
    task: str | None
    messages: list[dict[str, Any]]
    key_id: str
    model: str
    said: Said | None

    @property
    def is_plain(self) -> bool:
        """There is nothing but the one text."""
        return self.messages == [{"role": "user", "content": self.query}]

    @property
    def identity(self) -> str:
        """What tells it from other questions."""
        return identity(self.messages)

    @property
    def shown(self) -> str | list[dict[str, Any]]:
        """What a judge is shown: the text, or the conversation where there is more."""
        return self.query if self.is_plain else self.messages


def identity(messages: Messages) -> str:
    """What tells a conversation from others: who said what, case and white space aside; of one text alone, its `question`.

    All of a message counts: with a name beside it, a text is not alone. No text alone is what a conversation is: that begins with a line
    break, which no `question` with a letter in it has.
    """
    match messages:
        case [{"role": "user", "content": str(text), **others}] if not others:
            return question(text)
    parts = [
        (
            one.get("role"),
            normal_form(said) if isinstance(said := one.get("content"), str) else repr(said),
            *sorted((name, repr(value)) for name, value in one.items() if name not in ("role", "content")),
        )
        for one in messages
    ]
    return f"\n{parts!r}"


async def told_requests(store: Store, since_us: int) -> AsyncIterator[Origin]:
    """Answered requests of users that another model can be asked with, oldest first. What is damaged is passed over."""
    after = 0
    while (page := await told_page(store, since_us, after)) is not None:
        after = page.last_seq
        for origin in page.origins:
            yield origin


@dataclass(frozen=True, slots=True)
class Page:
    """Some rows of the ledger.

    Attributes:
        last_seq: of the last one.
        origins: those of them that another model can be asked with.
    """

    last_seq: int
    origins: list[Origin]


async def told_page(store: Store, since_us: int, after_seq: int, seen: dict[str, None] | None = None) -> Page | None:
    """The next rows behind one; None if there are none.

    Args:
        store: that holds them.
        since_us: microseconds since 1970 from which on.
        after_seq: the row.
        seen: ids of requests that are passed over, to which those of the page are added.
    """
    rows = await store.ledger(LedgerQuery(since_us=since_us, after_seq=after_seq, newest_first=False, limit=PAGE))
    if not rows:
        return None
    answered = [row for row in rows if row.status == "ok" and row.model and OUR_TAGS.isdisjoint(row.tags)]
    if seen is not None:
        answered = [row for row in answered if row.request_id not in seen]
        seen.update(dict.fromkeys(row.request_id for row in answered))
    _, texts = await store.told_of([row.request_id for row in answered]) if answered else ({}, {})
    origins = (_origin(row, texts.get(row.request_id, {})) for row in answered)
    return Page(rows[-1].seq or 0, [origin for origin in origins if origin is not None])


def _origin(row: LedgerRow, texts: Mapping[str, Any]) -> Origin | None:
    query, task = texts.get("query"), texts.get("task")
    messages = texts.get("messages", [{"role": "user", "content": query}])
    is_whole = isinstance(query, str) and query.strip() and len(query) < LONGEST_TEXT
    if not is_whole or texts.get("endpoint") != "chat" or texts.get("has_tools"):
        return None
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        return None
    assert isinstance(query, str)
    return Origin(
        request_id=row.request_id,
        asked_us=row.ts_us,
        query=query,
        task=task if isinstance(task, str) else None,
        messages=messages,
        key_id=row.key_id,
        model=row.model,
        said=_said(row, texts),
    )


def _said(row: LedgerRow, texts: Mapping[str, Any]) -> Said | None:
    """The answer, if it is what the model says to this conversation and nothing else: whole, at one go, with no setting of its own."""
    answer, settings, helpers = texts.get("answer"), texts.get("settings") or {}, texts.get("asked_nano")
    if not isinstance(answer, str) or len(answer) >= LONGEST_TEXT or texts.get("finish_reason") != "stop":
        return None
    if row.attempts != 1 or not isinstance(settings, dict) or set(settings) - _BOUNDS:
        return None
    # Not every upstream says that it was cut.
    if any(isinstance(bound, int) and bound <= row.completion_tokens for bound in settings.values()):
        return None
    return Said.of_row(answer, row, helpers if isinstance(helpers, int) else 0)


class Answers:
    """Which requests of users hold the answer of a model to a conversation: what one user was told is not asked for again for that user."""

    def __init__(self) -> None:
        self._request: dict[tuple[str, str], str] = {}

    def note(self, origin: Origin) -> None:
        """Remember where it is."""
        if origin.said is not None:
            self._request.setdefault((origin.key_id, call_key(origin.model, origin.messages, {})), origin.request_id)

    async def of(self, origin: Origin, model: str, store: Store) -> Said | None:
        """The answer of a model; None if nobody with the same key was given one."""
        if origin.model == model and origin.said is not None:
            return origin.said
        request_id = self._request.get((origin.key_id, call_key(model, origin.messages, {})))
        if request_id is None:
            return None
        rows = await store.ledger(LedgerQuery(request_id=request_id))
        _, texts = await store.told_of([request_id])
        return _said(rows[0], texts.get(request_id, {})) if rows else None


def may_ask(key: KeyRecord | None, key_id: str, models: Sequence[str]) -> bool:
    """Whether a question that came with a key may be shown to all of these models; of a key that is not known, to none."""
    return not key_id if key is None else all(key.allows(model) for model in models)
