"""The first steps of a request: what it asks for, whose it is, whether there is room for it, and the purse that it is paid out of."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

from anabranch.errors import CapacityError, InputError, RateError, UnknownModelError
from anabranch.gateway.ab.assignment import arm_of, counted_user
from anabranch.gateway.asked import asked_of
from anabranch.gateway.config import Target, find_target
from anabranch.gateway.config.default_models import KIND_OF, default_model
from anabranch.gateway.core.admission import limits_of
from anabranch.gateway.core.bounds import Bounds
from anabranch.gateway.core.model_calls import ModelCalls
from anabranch.gateway.core.purse import Purse
from anabranch.gateway.core.request_state import RequestState
from anabranch.gateway.counted_texts import Texts
from anabranch.gateway.logged_error import words
from anabranch.gateway.media_requests import asked_of_media, check_media, count_media, is_media
from anabranch.gateway.native_tokens import count_native
from anabranch.gateway.prompt_tokens import count_prompt, has_images
from anabranch.gateway.refusals import limited, unavailable
from anabranch.gateway.store import OUR_TAGS, subjects_of
from anabranch.gateway.store.speaking import speaks_for, spoken
from anabranch.gateway.validate import check_chat, check_completion, check_depth, check_embeddings
from anabranch.routers.money import nano_dollars
from anabranch.web.api_error import ApiError, wrong
from anabranch.web.body import said

T = TypeVar("T")

# Headers that are one of these words. What is none of them would be passed over in silence, and the sender believes that it is heeded.
WISHES = {"x-cache": ("allow", "deny"), "x-mid-stream": ("restart",)}


async def apart(state: RequestState, work: Callable[[], T]) -> T:
    """``work()``, in another thread where the body would hold up all other requests; there senders take turns."""
    return await state.services.turns.run(state.tenant, work) if state.is_long_to_read else work()


async def read_in_turns(state: RequestState) -> None:
    """`read`, beside the event loop where that takes long; what a tokenizer counts in many turns. Raises ApiError."""
    texts = await apart(state, lambda: _read(state))
    if texts is not None:
        state.count = await texts.counted(state.count, partial(apart, state))
        await apart(state, lambda: _look(state))


def read(state: RequestState) -> None:
    """Check the body, and find out where it wants to go and how long it is. Raises ApiError."""
    texts = _read(state)
    if texts is not None:
        state.count = texts.counted_at_once(state.count)
        _look(state)


def _read(state: RequestState) -> Texts | None:
    """The texts that are still to be counted before `_look`; None where it is done."""
    _check(state)
    body, runtime = state.body, state.runtime
    try:
        state.target = find_target(runtime.config, body["model"], state.allows)
    except UnknownModelError as error:
        raise ApiError(404, "model_not_found", str(error), param="model") from None
    except InputError as error:
        raise wrong("model", words(error)) from None
    state.label = label_of(state.target)
    if is_media(state.endpoint):
        if state.target.model is None:
            raise wrong("model", f"{state.endpoint} need a model by its name; strategies choose among models of text")
        state.count, state.asked = count_media(state.endpoint, body), asked_of_media(state.endpoint, body)
        return None
    native, counter = state.native, runtime.counters.get(state.target.model or "")
    texts = None if counter is None else Texts(counter)
    state.count = count_prompt(body, texts) if native is None else count_native(body, native.body, texts)
    if texts is None:
        _look(state)
    return texts


def _look(state: RequestState) -> None:
    """What there is to know of a request of text once it is known how long it is."""
    body, native = state.body, state.native
    state.asked = asked_of(body if native is None else native.body, state.count, is_chat=native is None)
    if state.endpoint == "chat" and state.target.strategy is not None:
        state.has_images = has_images(body["messages"])


def _check(state: RequestState) -> None:
    body, most_tokens = state.body, state.runtime.config.limits.most_tokens
    for header, known in WISHES.items():
        wish = state.headers.get(header, "")
        if wish and wish.lower() not in known:
            raise wrong(header, f"{header} is {said(wish)}; it must be {' or '.join(known)}, or left out")
    check_depth(body)
    if state.endpoint == "chat":
        check_chat(body, most_tokens)
    elif state.endpoint == "completions":
        check_completion(body, most_tokens)
    elif is_media(state.endpoint):
        if state.endpoint in KIND_OF and body.get("model") is None:
            body = state.body = {**body, "model": _default_model(state)}
        check_media(state.endpoint, body)
    else:
        check_embeddings(body)


def _default_model(state: RequestState) -> str:
    """Of a request that names none. Raises ApiError."""
    try:
        return default_model(state.runtime.config, state.endpoint, state.allows)
    except InputError as error:
        raise wrong("model", words(error)) from None


def label_of(target: Target) -> str:
    """What caches and the ledger call a target: knobs sorted."""
    if target.model is not None:
        return target.model
    knobs = "&".join(f"{name}={value}" for name, value in sorted(target.knobs.items()))
    return f"auto/{target.test or target.strategy}" + (f"?{knobs}" if knobs else "")


async def name(state: RequestState) -> None:
    """Whose it is: of the user and the tags that it names, those are taken as they stand that its sender may speak for. Raises ApiError."""
    record, given = state.record, state.headers.get("x-tags", "")
    added = tuple(tag.strip() for tag in given.split(",") if tag.strip()) if given else ()
    named = state.body.get("user") or ""
    ours = () if state.collecting is None else (state.collecting.tag,)
    if not ours and (odd := OUR_TAGS.intersection(added)):
        raise wrong("x-tags", f"the tag {min(odd)} is that of the gateway's own questions; take another")
    try:
        allowed = await _speaks_for(state) if named or added else ()
        found = spoken(record, allowed, user=named, tags=added)
        state.tags = (*found.tags, *ours)
        state.subjects = subjects_of(record, user=found.user, tags=state.tags)
    except InputError as error:
        raise wrong("x-tags", words(error)) from None
    except CapacityError as error:
        raise unavailable(error) from None
    state.user, state.named_user = found.user, (record.user if record is not None else "") or named[:256]


async def _speaks_for(state: RequestState) -> tuple[str, ...]:
    # A key is one; without any, nobody's budget or record can be meant but by who comes without one.
    has_keys = state.record is not None or await state.services.store.has_keys()
    return speaks_for(state.record, state.runtime.config.keys.speaks_for, has_keys=has_keys)


def take_place(state: RequestState) -> None:
    """One of its sender's among all requests, before it is read: those that wait to be read are under way too. Raises ApiError."""
    limits = limits_of(state.record, state.runtime.config.limits)
    try:
        state.services.admission.place(state.tenant, limits, state.held)
    except RateError as error:
        raise limited(error) from None
    state.has_place = True


async def admit(state: RequestState) -> None:
    """Whether its sender has asked too much of late. Raises ApiError."""
    limits = limits_of(state.record, state.runtime.config.limits)
    # It is given back with the rest where there is no room for it.
    state.has_place = False
    try:
        state.is_rate_shared = await state.services.admission.enter(
            state.tenant, state.id, state.count.tokens, limits, has_place=True
        )
    except RateError as error:
        raise limited(error) from None
    state.is_counted, state.tpm = True, limits.tpm


def assign(state: RequestState) -> None:
    """The arm of an A/B test that it belongs to, if it goes to one: from here on it goes to the strategy of that arm."""
    test = state.target.test
    if test is None:
        return
    settings = state.runtime.config.ab[test]
    user, among = counted_user(settings, state.record, state.body.get("user") or "")
    state.arm = arm_of(test, settings, key=state.tenant, user=user, among=among)
    state.target = replace(state.target, strategy=state.arm.strategy)


def take_purse(state: RequestState) -> None:
    """What it is paid out of, and what its strategy or program may ask models with."""
    state.bounds = Bounds(state.endpoint, state.body, state.runtime, state.count, state.asked)
    # Nothing of this holds on to the request itself: it is gone as soon as it is over.
    services, limit = state.services, state.runtime.config.limits.request_usd
    id, subjects, named = state.id, state.subjects, {"requested": state.label, "strategy": state.strategy}
    state.purse = Purse(
        lambda nano: services.store.reserve(id, subjects, nano, **named),
        services.store.grow,
        None if limit is None else nano_dollars(limit),
        lambda: services.store.has_budget(subjects),
    )
    state.calls = ModelCalls(
        state.runtime,
        state.purse,
        id,
        state.began,
        may_ask=None if state.record is None else state.record.allows,
        keep=services.keep_task,
        sender=state.sender,
        trace=state.trace,
    )
