"""Routes that ask no engine: tokens of a text, text of tokens."""

from collections.abc import Callable
from typing import Any, TypeVar

from aiohttp import web

from anabranch.serving.http import fields
from anabranch.serving.http.adapter_names import chosen
from anabranch.serving.http.asked import LONG_CHARACTERS
from anabranch.serving.http.choice import TEXT_BYTES
from anabranch.serving.http.context import RequestContext
from anabranch.serving.http.frontend import Frontend
from anabranch.web.api_error import wrong
from anabranch.web.body import is_int
from anabranch.web.json_text import Rows

_TOKENIZE = {
    "model": fields.text(256),
    "prompt": fields.text(2**30),
    "messages": (lambda value: isinstance(value, list), "a list"),
    "add_generation_prompt": fields.BOOL,
    "chat_template_kwargs": fields.KWARGS,
    "return_token_strs": fields.BOOL,
}
_DETOKENIZE = {"model": fields.text(256), "tokens": (lambda value: isinstance(value, list), "a list of token ids")}
# Of an id in a list, as Python holds them.
ID_BYTES = 36
T = TypeVar("T")


class Tokens:
    """These routes.

    Args:
        frontend: whose model it is.
    """

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def tokenize(self, context: RequestContext) -> web.StreamResponse:
        """``{"prompt": text}`` or ``{"messages": [...]}`` as token ids."""
        info, reader = self._frontend.check_ready()
        body = await self._body(context, _TOKENIZE, is_model_needed=False)
        if (body.get("prompt") is None) == (body.get("messages") is None):
            raise wrong("prompt", "give prompt or messages, one of the two")
        text, encode, apart = body.get("prompt"), reader.encode, self._frontend.apart
        if text is None:
            is_open = body.get("add_generation_prompt") is not False

            def rendered() -> str:
                return reader.render(body["messages"], None, is_open=is_open, values=reader.template_values(body)[0])

            text = await apart(context.key, rendered, is_rendering=True)
            encode = reader.encode_chat

        tokens = await self._maybe_apart(context, len(text or ""), encode, text) if text else ()
        context.hold(ID_BYTES * len(tokens))
        found: dict[str, Any] = {"tokens": tokens, "count": len(tokens), "max_model_len": info.max_positions}
        if body.get("return_token_strs"):
            found["token_strs"] = Rows(lambda: (reader.token_text(token)[0] for token in tokens))
        return await context.give_json(found)

    async def detokenize(self, context: RequestContext) -> web.StreamResponse:
        """``{"tokens": [...]}`` as text."""
        info, reader = self._frontend.check_ready()
        body = await self._body(context, _DETOKENIZE, is_model_needed=False)
        tokens = body.get("tokens") or []

        def decoded() -> str:
            if body.get("tokens") is None or not all(
                is_int(token) and 0 <= token < info.vocab_size for token in tokens
            ):
                raise wrong("tokens", f"tokens must be a list of token ids from 0 to {info.vocab_size - 1:,}")
            return reader.decode(tokens)

        text = await self._maybe_apart(context, len(tokens), decoded)
        context.hold(TEXT_BYTES * len(text))
        return await context.give_json({"prompt": text})

    async def _maybe_apart(self, context: RequestContext, length: int, function: Callable[..., T], *args: Any) -> T:
        """What a function returns, from a thread if it reads so much."""
        return await self._frontend.apart(context.key, function, *args) if length > LONG_CHARACTERS else function(*args)

    async def _body(
        self, context: RequestContext, known: dict[str, fields.Check], is_model_needed: bool = True
    ) -> dict[str, Any]:
        info, _ = self._frontend.check_ready()
        body = await context.body(most_tokens=2 * info.max_positions)
        chosen(body, self._frontend.names, self._frontend.adapters, is_needed=is_model_needed)
        for name, value in body.items():
            if name in known and value is not None:
                fields.expect(name, value, known[name])
        context.warn(tuple(name for name in body if name not in known), known)
        return body
