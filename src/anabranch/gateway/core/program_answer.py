"""The answer of a program, where the strategy that a request goes to is one (`ProgramRun` is the run itself)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anabranch.gateway.core.choice import allowed, pool_of
from anabranch.gateway.core.payable import payable
from anabranch.gateway.core.program_run import ProgramRun
from anabranch.gateway.core.request_state import RequestState
from anabranch.gateway.decide import Decided
from anabranch.gateway.lane import lasts
from anabranch.gateway.providers.provider import Answer
from anabranch.routers.contract.program import Program, ProgramRequest
from anabranch.web.api_error import wrong

# Of the body, what is no setting of a program's calls.
NOT_SETTINGS = frozenset({"model", "messages", "n", "best_of", "stream", "stream_options", "store", "metadata"})


async def ask_program(state: RequestState) -> Answer | ProgramRun | None:
    """What the program says that was asked for: whole, or as a stream past its first piece.

    None if it was none, was passed over, or failed before it said anything; then a model is to answer. Raises ApiError for what no
    program answers.
    """
    name, decided = state.target.strategy, state.decided
    program = None if name is None else state.runtime.decider.program(name)
    if program is None or name is None or decided is None:
        return None
    if state.endpoint != "chat":
        raise wrong(
            "model", f"{state.label} is a program: it answers /v1/chat/completions, /v1/responses and /v1/messages"
        )
    if (state.body.get("n") or 1) != 1:
        raise wrong("n", f"{state.label} is a program: it answers with one choice (n = 1)")
    if decided.bypassed:
        return None
    state.clock.begin("call")
    # As for a model that is named; each of its calls is looked at too, since it may ask others.
    usable = allowed(state, decided.decision.candidates)
    await payable(state.runtime, state.asked, usable, state.purse.is_limited)
    state.calls.deadline_s = state.calls.limit_s = _most_s(state, decided)
    state.calls.purpose, state.dispatched = "draft", state.elapsed()
    running = _begun(state, program, decided)
    try:
        await running.open()
        answer = None if state.body.get("stream") else await running.whole()
    except Exception as error:
        await running.aclose()
        await state.calls.stop()
        state.decided = replace(decided, bypassed=state.runtime.decider.bypass(name, error), lasts=lasts(error))
        return None
    except BaseException:
        await running.aclose()
        raise
    state.program, state.report = running, running.report
    if answer is None:
        return running
    await state.calls.stop()
    return answer


def _most_s(state: RequestState, decided: Decided) -> float:
    """Seconds that it has: those of the slowest model that it may ask."""
    config = state.runtime.config
    names = [*(one.model for one in decided.decision.candidates), *decided.decision.beside]
    own = (state.runtime.models[name].deadline_s for name in names)
    return max(max((seconds for seconds in own if seconds is not None), default=config.deadline_s), config.deadline_s)


def _begun(state: RequestState, program: Program, decided: Decided) -> ProgramRun:
    body: Mapping[str, Any] = state.body
    options = body.get("stream_options")
    left_s = state.calls.deadline_s - state.elapsed()
    request = ProgramRequest(
        query=decided.query,
        pool=pool_of(state),
        decision=decided.decision,
        is_streamed=bool(body.get("stream")),
        settings={field: value for field, value in body.items() if field not in NOT_SETTINGS},
        left_s=left_s,
    )
    return ProgramRun(
        program,
        request,
        state.calls,
        id=state.id,
        left_s=left_s,
        beat_s=state.runtime.dispatcher.rules.heartbeat_s,
        wants_usage=isinstance(options, dict) and bool(options.get("include_usage")),
    )
