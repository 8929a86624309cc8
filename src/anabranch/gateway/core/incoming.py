"""`Incoming`: a request as it comes to the gateway, before anything is known of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from anabranch.gateway.core.decision_log import Collecting
from anabranch.gateway.core.held_body import HeldBody
from anabranch.gateway.providers.provider import Native
from anabranch.gateway.store import KeyRecord


@dataclass(frozen=True, slots=True)
class KnownKey:
    """A key that was looked up already, as before the body of a request is read: it need not be again.

    Attributes:
        record: of the key; None where none is needed and none that is known was sent.
    """

    record: KeyRecord | None


# What a request comes with: a key as it was sent, one that was looked up, or none.
Key = str | KnownKey | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """One request.

    Attributes:
        endpoint: ``chat``, ``completions``, ``embeddings``, or one of media.
        body: as OpenAI's endpoint takes it.
        headers: of the request; names in lower case, or a mapping that does not mind.
        shown_as: what metrics call the endpoint; "" for its name.
        collecting: what it is collected for; None for a request of a user.
        num_bytes: of the body as it came; 0 if that is not known. A large one is read, counted and sent in other threads.
        native: what ``body`` was made of, if it came in another form.
        held: what the body takes, if it was held when it came; the request holds it too until it ends.
    """

    endpoint: Any
    body: dict[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)
    shown_as: str = ""
    collecting: Collecting | None = None
    num_bytes: int = 0
    native: Native | None = None
    held: HeldBody | None = None
