"""Instructions and vectors of texts by an endpoint that speaks OpenAI's API, such as `anabranch serve` and `anabranch gateway serve`.

writer = ChatWriter("http://127.0.0.1:8000/v1", "SmolLM2-135M-Instruct")
pool = GliderPool.load("adapters", writer=writer)                                   # instructions of queries; or pool.add(examples=...)
pool = GliderPool.load("adapters", embedder=EndpointEmbedder("http://127.0.0.1:8000/v1", "nomic-embed-text-v1.5"))
"""
# Shapes: N texts, D dimensions

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from anabranch.errors import ConfigError, DataError
from anabranch.web.endpoint import LONGEST, Endpoint

__all__ = ["ChatWriter", "EndpointEmbedder"]

# Texts of one call.
_MOST_TEXTS = 128
# Characters of an instruction, as many as a server takes of a query: it is compared, kept and told.
_MOST_WRITTEN = 2000
_ROLE = (
    "You describe tasks. In one or two sentences, describe the task that the user's text is of and the skills that it takes. Write it as "
    "an instruction. Do not name a data set, and do not do the task."
)


class ChatWriter(Endpoint):
    """Writes instructions: one or two sentences on the task that a text is of, by a chat without sampling.

    A query is sent as it is, and so is what `prompt_of` makes of examples. Arguments are those of the endpoint: its ``url``, the ``model``
    there, ``key_env`` and ``timeout_s``; and ``max_tokens``, of an instruction.
    """

    def __init__(self, url: str, model: str, *, max_tokens: int = 128, **options: Any) -> None:
        super().__init__(url, model, **options)
        if max_tokens < 1:
            raise ConfigError(f"max_tokens is {max_tokens}; an instruction has at least one")
        self.max_tokens = max_tokens

    def __call__(self, text: str) -> str:
        """The instruction. Raises DataError where the endpoint gives none, or one of more than 2,000 characters."""
        messages = [{"role": "system", "content": _ROLE}, {"role": "user", "content": text}]
        body = {"model": self.model, "messages": messages, "max_tokens": self.max_tokens, "temperature": 0}
        found = self.post("/chat/completions", body)
        try:
            said = found["choices"][0]["message"]["content"]
        except (LookupError, TypeError):
            said = None
        if not isinstance(said, str) or not said.strip():
            wordless = DataError(f"{self.name} wrote no instruction: {self.without_key(json.dumps(found))[:LONGEST]}")
            # It is there, and may know what to say of others.
            wordless.is_of_this_call = True
            raise wordless
        if len(said) > _MOST_WRITTEN:
            endless = DataError(
                f"{self.name} wrote {len(said):,} characters; an instruction has {_MOST_WRITTEN:,} at most"
            )
            endless.is_of_this_call = True
            raise endless
        return " ".join(self.without_key(said).split())


class EndpointEmbedder(Endpoint):
    """Makes vectors of texts; its arguments are those of the endpoint."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 ``[N, D]``. Raises DataError where the endpoint gives anything else than a vector for each text, of one size."""
        made: list[np.ndarray] = []
        for first in range(0, len(texts), _MOST_TEXTS):
            given = list(texts[first : first + _MOST_TEXTS])
            found = self.post("/embeddings", {"model": self.model, "input": given, "encoding_format": "float"})
            made += self._vectors(found, len(given))
        if len({len(vector_D) for vector_D in made}) > 1:
            raise DataError(f"{self.name} gives vectors of {sorted({len(vector_D) for vector_D in made})} numbers")
        return np.stack(made) if made else np.zeros((0, 1), np.float32)

    def _vectors(self, found: dict[str, Any], count: int) -> list[np.ndarray]:
        data: Any = found.get("data")
        try:
            # What is beyond float32 is infinite there, and refused below.
            with np.errstate(over="ignore"):
                by_place = {one["index"]: np.asarray(one["embedding"], np.float32) for one in data}
        # Whole numbers of hundreds of digits are JSON, too.
        except (LookupError, TypeError, ValueError, OverflowError):
            by_place = {}
        vectors = [by_place.get(place) for place in range(count)]
        if len(by_place) != count or any(
            vector_D is None or vector_D.ndim != 1 or not len(vector_D) or not np.isfinite(vector_D).all()
            for vector_D in vectors
        ):
            without = DataError(f"{self.name} does not give a vector of finite numbers for each of {count} texts")
            without.is_of_this_call = True
            raise without
        return [vector_D for vector_D in vectors if vector_D is not None]
