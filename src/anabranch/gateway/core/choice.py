"""Where a request goes: what its strategy says, or the model that was named and its fallbacks, as far as its key and its length let it."""

from dataclasses import replace

from anabranch.gateway.core.request_state import RequestState
from anabranch.gateway.decide import Decided
from anabranch.gateway.prompt_tokens import asked_text
from anabranch.gateway.providers.provider import WRITES
from anabranch.routers.contract.query import Candidate, Decision, Pool, Query
from anabranch.web.api_error import ApiError

# Of a request, what no strategy is shown.
SECRET_HEADERS = frozenset({"authorization", "x-api-key", "api-key", "cookie", "proxy-authorization"})


async def decide(state: RequestState) -> None:
    """Candidates, best first. Raises ApiError for knobs that the sender set wrong."""
    if state.target.strategy is None:
        assert state.target.model is not None
        names = state.runtime.config.chain(state.target.model)
        candidates = tuple(Candidate(model=name, score=1 / (1 + at)) for at, name in enumerate(names))
        # With which chance the sender named it, nobody knows.
        decision = Decision(candidates=candidates, strategy="", reason="the sender named the model")
        state.decided = Decided(decision, "", Query(text=""))
        return
    decider = state.runtime.decider
    try:
        query, pool = query_of(state), pool_of(state)
        state.decided = decided = await decider.decide(state.target.strategy, query, pool, state.calls, state.vectors)
    finally:
        # What a strategy leaves behind would hold money that the answer needs.
        await state.calls.stop()
    if not decided.bypassed:
        state.prepared = await decider.prepared(state.target.strategy, decided.query, decided.decision)
        state.bounds.prepared = state.prepared


def query_of(state: RequestState) -> Query:
    """The request as a strategy sees it."""
    body = state.body
    messages = body["messages"] if state.endpoint == "chat" else ()
    most = body.get("max_completion_tokens") or body.get("max_tokens") if state.endpoint in WRITES else None
    headers = {name.lower(): value for name, value in state.headers.items() if name.lower() not in SECRET_HEADERS}
    return Query(
        text=asked_text(state.endpoint, body),
        messages=messages,
        task=headers.get("x-task"),
        prompt_tokens=state.count.tokens,
        max_tokens=most,
        has_tools=bool(body.get("tools")),
        has_images=state.has_images,
        headers=headers,
        tenant=state.tenant,
        user=state.named_user,
        knobs=state.target.knobs,
        request_id=state.id,
    )


def pool_of(state: RequestState) -> Pool:
    """The models as they are, those that this request may not use marked as not available: what is never given was never drawn."""
    pool, record = state.runtime.dispatcher.pool(), state.record
    open_P = [record is None or record.allows(model.name) for model in pool.models]
    fits_P = [allowed and fits(state, model.name) for allowed, model in zip(open_P, pool.models, strict=True)]
    usable_P = fits_P if any(fits_P) else open_P
    if all(usable_P):
        return pool
    models = (
        model if usable else replace(model, is_available=False, is_allowed=is_open)
        for model, usable, is_open in zip(pool.models, usable_P, open_P, strict=True)
    )
    return Pool(tuple(models), pool.now_s)


def allowed(state: RequestState, candidates: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    """Those that the key may use and that have room for the prompt. Raises ApiError if the key may use none."""
    record = state.record
    if record is not None and record.models:
        named = state.target.model
        # Who names a model means it: another one, in its place, would be no fallback but a surprise.
        is_closed = named is not None and not record.allows(named)
        candidates = tuple(one for one in candidates if record.allows(one.model))
        if is_closed or not candidates:
            raise ApiError(403, "model_not_allowed", f"this key may use {', '.join(record.models)}", param="model")
    fitting = tuple(one for one in candidates if fits(state, one.model))
    return fitting or candidates


def fits(state: RequestState, model: str) -> bool:
    """Whether a model's context has room for the prompt."""
    context = state.runtime.models[model].context
    return context is None or state.count.tokens <= context
