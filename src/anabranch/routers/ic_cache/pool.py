"""The pool of examples: who may enter, who may see, what must go.

An example serves its own tenant in its own domain. It enters only if that domain has opted in, the sender did not forbid it
(``store: false``), and the model that answered is trusted enough (else one bad answer would teach many). It goes when it expires, when
it is erased, or when others are worth more of the room (`manager`).
"""
# Shapes: N examples, D dimensions

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, configclass
from anabranch.errors import InputError
from anabranch.routers.contract.query import Query
from anabranch.routers.contract.strategy import Arrays, Facts
from anabranch.routers.contract.strategy import Example as Kept
from anabranch.routers.embed.checked import checked_rows
from anabranch.routers.ic_cache.example import ANY_DOMAIN, Example
from anabranch.routers.ic_cache.redact import Redact, redact_personal
from anabranch.routers.retrieve.index import Index, unit_rows
from anabranch.routers.wording import normal_form

logger = logging.getLogger(__name__)
Embed = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True, slots=True)
class Admission:
    """Whether an answer entered the pool.

    Attributes:
        id: of the example; None if it did not enter.
        reason: one of a few fixed phrases, to be counted.
    """

    id: int | None
    reason: str


class ExamplePool(Part):
    """Examples by id, and the index that finds them.

    Args:
        config: who may enter.
        index: where their vectors go; empty.
        redact: what is done to texts before they are kept.
    """

    @configclass
    class Config(BaseConfig):
        """Who may enter, and for how long.

        Attributes:
            domains: that have opted in (``Query.task``); "*" is all of them, "" those queries that name none.
            trust: level of each model; one that is not named has 0.
            min_trust: least level of a model whose answers are kept.
            ttl_s: seconds until an example expires; None for never.
            max_bytes: of plain text, of all examples together.
            max_example_bytes: of one of them.
        """

        domains: tuple[str, ...] = ()
        trust: dict[str, int] = Field(default_factory=dict)
        min_trust: int = 1
        ttl_s: float | None = Field(default=30 * 86400.0, gt=0)
        max_bytes: int = Field(default=64 * 2**20, ge=1)
        max_example_bytes: int = Field(default=16 * 2**10, ge=1)

    def __init__(self, config: Any, index: Index, *, redact: Redact = redact_personal) -> None:
        self.config, self.index, self.redact = config, index, redact
        self.size_bytes = 0
        # Caches of prompts that hold examples.
        self.on_removed: list[Callable[[set[int]], None]] = []
        self._examples: dict[int, Example] = {}
        self._by_key: dict[str, int] = {}
        self._next_id = 0
        # Keys of examples that came, changed or went since `changed` was asked.
        self._touched: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._examples)

    def __contains__(self, id: int) -> bool:
        return id in self._examples

    def __iter__(self) -> Any:
        return iter(list(self._examples.values()))

    def get(self, id: int) -> Example:
        """An example. Raises InputError for an unknown id."""
        if id not in self._examples:
            raise InputError(f"no example {id} in the pool")
        return self._examples[id]

    # Entering

    def refusal(self, query: Query, response: str, model: str, *, store: bool = True) -> str | None:
        """Why such an answer may not enter; None if it may."""
        if not store:
            return "sender forbids it"
        if ANY_DOMAIN not in self.config.domains and domain_of(query) not in self.config.domains:
            return "domain has not opted in"
        if self.config.trust.get(model, 0) < self.config.min_trust:
            return "model is not trusted"
        return None if query.text.strip() and response.strip() else "nothing in it"

    def admit(
        self,
        query: Query,
        response: str,
        model: str,
        *,
        now_s: float,
        vector_D: np.ndarray | None = None,
        embed: Embed | None = None,
        quality: float | None = None,
        store: bool = True,
        make_room: Callable[[int], None] = lambda size: None,
        source: str = "",
    ) -> Admission:
        """Keep a request with its answer, if it may be kept.

        Args:
            query: the request; its task is the domain.
            response: the answer.
            model: that gave it.
            now_s: the time.
            vector_D: of the request; used only where redaction leaves that as it is, since a vector tells of the words it is made of.
            embed: makes the vector otherwise.
            quality: 0 to 1, if known.
            store: what the sender said.
            make_room: called with the bytes that are missing, may evict.
            source: see `Example`.

        The same request again takes the place of the older answer, unless that is trusted more or known to be better.
        """
        reason = self.refusal(query, response, model, store=store)
        if reason:
            return Admission(None, reason)
        request, answer = self.redact(query.text).strip(), self.redact(response).strip()
        if request != query.text.strip() or vector_D is None:
            if embed is None:
                return Admission(None, "no vector of what is kept")
            vector_D = checked_rows(embed([request]), 1)[0]
        example = Example(
            id=self._next_id,
            tenant=query.tenant,
            domain=domain_of(query),
            user=query.user,
            request=request,
            response=answer,
            model=model,
            trust=self.config.trust.get(model, 0),
            created_s=now_s,
            quality=quality,
            offloads_s=now_s,
            source=source,
            expires_s=None if self.config.ttl_s is None else now_s + self.config.ttl_s,
        )
        size = example.size_bytes
        if size > min(self.config.max_example_bytes, self.config.max_bytes):
            return Admission(None, "too large")
        key = _key(example)
        older = self._examples.get(self._by_key.get(key, -1))
        if older is not None and (older.trust, older.quality or 0) > (example.trust, quality or 0):
            return Admission(None, "a better answer is there")
        # What may fail comes before anything is changed.
        vector_D = unit_rows(vector_D, self.index.dim, "vector")[0]
        missing = self.size_bytes + size - self.config.max_bytes - (older.size_bytes if older is not None else 0)
        if missing > 0:
            make_room(missing)
        older = self._examples.get(self._by_key.get(key, -1))
        if self.size_bytes + size - (older.size_bytes if older is not None else 0) > self.config.max_bytes:
            return Admission(None, "pool is full")
        if older is not None:
            example.uses, example.helped, example.rated = older.uses, older.helped, older.rated
            example.offloads, example.offloads_s = older.offloads, older.offloads_s
            self.remove([older.id])
        self._keep(example, key, vector_D)
        return Admission(example.id, "kept")

    def _keep(self, example: Example, key: str, vector_D: np.ndarray) -> None:
        self.index.add(vector_D[None], [example.id], namespace=namespace(example.tenant, example.domain))
        self._examples[example.id] = example
        self._by_key[key] = example.id
        self.size_bytes += example.size_bytes
        self._next_id = example.id + 1
        self._touched[key] = None

    def replace_response(self, id: int, response: str, quality: float | None) -> None:
        """Another answer to the same request (replay)."""
        example = self.get(id)
        self.size_bytes -= example.size_bytes
        example.replace_response(self.redact(response).strip(), quality)
        self.size_bytes += example.size_bytes
        self._tell_removed({id})
        self.touch(example)

    # Finding

    def search(self, query: Query, vector_D: np.ndarray, k: int, *, now_s: float) -> tuple[list[Example], np.ndarray]:
        """The most similar examples that this query may see and that are alive, with their similarities, falling."""

        def alive(id_N: np.ndarray) -> np.ndarray:
            return np.fromiter((self._examples[id].is_alive(now_s) for id in id_N.tolist()), bool, len(id_N))

        place = namespace(query.tenant, domain_of(query))
        id_K, similarity_K = self.index.search(vector_D, k, namespace=place)
        if not all(self._examples[id].is_alive(now_s) for id in id_K.tolist()):
            id_K, similarity_K = self.index.search(vector_D, k, namespace=place, allow=alive)
        return [self._examples[id] for id in id_K.tolist()], similarity_K

    # Leaving

    def remove(self, ids: Iterable[int]) -> int:
        """Take examples out of pool and index, and tell caches of prompts; returns how many were there."""
        gone = {id for id in ids if id in self._examples}
        for id in gone:
            example = self._examples.pop(id)
            self.size_bytes -= example.size_bytes
            key = _key(example)
            self._by_key.pop(key, None)
            self._touched[key] = None
        self.index.remove(gone)
        self._tell_removed(gone)
        return len(gone)

    def _tell_removed(self, ids: set[int]) -> None:
        if ids:
            for tell in self.on_removed:
                tell(ids)

    def forget(self, *, tenant: str, user: str | None = None, ids: Iterable[int] | None = None) -> set[int]:
        """The right to erasure: remove a tenant's examples, all of them, those of a user, or those with these ids; returns their ids.

        Vectors leave memory at once. Ids of other tenants are passed over.
        """
        wanted = None if ids is None else set(ids)
        gone = {
            example.id
            for example in self
            if example.tenant == tenant
            and (user is None or example.user == user)
            and (wanted is None or example.id in wanted)
        }
        self.remove(gone)
        self.index.compact()
        return gone

    def expire(self, now_s: float) -> int:
        """Remove what has expired; returns how many."""
        return self.remove([example.id for example in self if not example.is_alive(now_s)])

    # Others who keep the same

    def touch(self, example: Example) -> None:
        """What is remembered of it has changed."""
        if example.id in self._examples:
            self._touched[_key(example)] = None

    def changed(self, most: int) -> list[Kept]:
        """Some of what came, changed or went since the last time."""
        found = []
        for key in list(self._touched)[:most]:
            del self._touched[key]
            example = self._examples.get(self._by_key.get(key, -1))
            if example is None:
                found.append(Kept(key, None))
            else:
                found.append(Kept(key, example.to_dict(), self.index.vectors([example.id])[0]))
        return found

    def take(self, kept: Sequence[Kept]) -> None:
        """Take over what others tell of, and tell nobody of it. What does not fit is left out."""
        touched, self._touched = self._touched, {}
        news: dict[str, list[tuple[Example, np.ndarray]]] = {}
        for one in {one.key: one for one in kept}.values():
            self.remove([self._by_key[one.key]] if one.key in self._by_key else ())
            example = self._taken(one)
            if example is not None and one.vector_D is not None:
                news.setdefault(namespace(example.tenant, example.domain), []).append((example, one.vector_D))
        for place, examples in news.items():
            self.index.add(
                np.array([vector_D for _, vector_D in examples]), [e.id for e, _ in examples], namespace=place
            )
            for example, _ in examples:
                self._examples[example.id] = example
                self._by_key[_key(example)] = example.id
                self.size_bytes += example.size_bytes
        self._touched = touched

    def _taken(self, one: Kept) -> Example | None:
        vector_D = one.vector_D
        if one.body is None or vector_D is None:
            return None
        try:
            example = Example(**{**one.body, "id": self._next_id})
            fits = (
                vector_D.shape == (self.index.dim,) and bool(np.isfinite(vector_D).all()) and _key(example) == one.key
            )
        except (TypeError, AttributeError) as error:
            logger.warning("an example in the store cannot be read: %s", error)
            return None
        if not fits:
            logger.warning("an example in the store does not fit and is left out")
            return None
        self._next_id += 1
        return example

    # Another embedder, and the disk

    def reindex(self, index: Index, embed: Embed) -> None:
        """Embed all requests anew into another, empty index. Raises DataError for what is no vector of each, and nothing has changed."""
        examples = list(self)
        for start in range(0, len(examples), 1024):
            part = examples[start : start + 1024]
            vector_ND = checked_rows(embed([example.request for example in part]), len(part))
            for place in dict.fromkeys(namespace(e.tenant, e.domain) for e in part):
                rows = [row for row, e in enumerate(part) if namespace(e.tenant, e.domain) == place]
                index.add(vector_ND[rows], [part[row].id for row in rows], namespace=place)
        self.index = index

    def state(self) -> tuple[Arrays, Facts]:
        """All examples and the index."""
        arrays, facts = self.index.state()
        return arrays, {"index": facts, "examples": [e.to_dict() for e in self], "next_id": self._next_id}

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave."""
        self.index.load_state(arrays, facts["index"])
        self._examples = {row["id"]: Example(**row) for row in facts["examples"]}
        self._by_key = {_key(e): e.id for e in self}
        self.size_bytes = sum(example.size_bytes for example in self)
        self._next_id = facts["next_id"]


def _key(example: Example) -> str:
    """Whose it is and what is asked: there is one example of each."""
    text = namespace(example.tenant, example.domain) + normal_form(example.request)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def domain_of(query: Query) -> str:
    """The domain of a request: its task."""
    return query.task or ""


def namespace(tenant: str, domain: str) -> str:
    """One name for both, that no other pair has."""
    return json.dumps([tenant, domain])
