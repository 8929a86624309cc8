"""Tokens of a prompt, counted here: as a model of this process reads it, else by the model's tokenizer, else a quarter of the bytes."""

import asyncio
from functools import partial

from anabranch.errors import InputError, UnknownModelError
from anabranch.gateway.config import find_target
from anabranch.gateway.core.engine_counts import engine_count
from anabranch.gateway.core.request_state import TOKENIZED
from anabranch.gateway.counted_texts import Texts
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.exchange import Exchange, Received
from anabranch.gateway.logged_error import words
from anabranch.gateway.native_tokens import count_native
from anabranch.gateway.prompt_tokens import count_prompt
from anabranch.gateway.providers.provider import UpstreamRequest
from anabranch.gateway.validate import check_model
from anabranch.web.api_error import ApiError


async def counted(gateway: Gateway, exchange: Exchange, received: Received, *, is_native: bool = False) -> int:
    """Of a request that has been made a chat. Raises ApiError where the key may not ask that model, or not now.

    ``is_native``: it would be sent as it came to ``/v1/responses``.
    """
    # A thread counts on when its client goes away: until it ends it is under way.
    counting = asyncio.ensure_future(_counted(gateway, exchange, received, is_native))
    if (held := received.held) is not None:
        held.share()
        counting.add_done_callback(lambda done: held.close())
    gateway.keep(counting)
    return await asyncio.shield(counting)


async def _counted(gateway: Gateway, exchange: Exchange, received: Received, is_native: bool) -> int:
    chat, record, runtime = received.chat, received.key.record, gateway.runtime
    async with gateway.counted(record, received.held):
        try:
            target = find_target(
                runtime.config, check_model(chat), lambda model: record is None or record.allows(model)
            )
        except UnknownModelError as error:
            raise ApiError(404, "model_not_found", str(error), param="model") from None
        except InputError as error:
            raise ApiError(400, "invalid_value", words(error), param="model") from None
        if record is not None and target.model is not None and not record.allows(target.model):
            message = f"this key may use {', '.join(record.models)}"
            raise ApiError(403, "model_not_allowed", message, param="model")
        counter = runtime.counters.get(target.model or "")
        work = partial(count_native, chat, received.body) if is_native else partial(count_prompt, chat)
        is_long = received.is_long or (counter is not None and received.num_bytes > TOKENIZED)
        texts = None if counter is None else Texts(counter)
        beside = partial(exchange.apart, received.key, is_long)
        count = await beside(partial(work, texts))
        if texts is not None:
            count = await texts.counted(count, beside)
        if target.model is None:
            return count.tokens
        sender, request = (
            "" if record is None else record.sender,
            # Counted already: to write it down to see how long it is would take this thread as long as all else.
            UpstreamRequest("chat", chat, prompt_tokens=count.tokens, num_bytes=received.num_bytes),
        )
        with runtime.used():
            return (await engine_count(runtime, target.model, request, count, sender, is_free_too=True)).tokens
