"""The end of a request: its rows in the ledger, what is told of it, and what the strategy that decided learns of it."""

import logging
from dataclasses import replace

from anabranch.gateway.core import settlement
from anabranch.gateway.core.decision_log import collected_of, explained, texts_of
from anabranch.gateway.core.finished import Priced
from anabranch.gateway.core.ledger_row import call_rows, finished, priced, row_of
from anabranch.gateway.core.request_state import RequestState
from anabranch.gateway.dispatch import Report
from anabranch.gateway.logged_error import raised
from anabranch.gateway.metrics import StageClock
from anabranch.gateway.store import LedgerRow, Reservation
from anabranch.routers.contract.query import Outcome
from anabranch.routers.money import dollars
from anabranch.web.turns import plainly

logger = logging.getLogger(__name__)


def conclude(state: RequestState, status: str, http_status: int, code: str, cache: str, latency_s: float) -> None:
    """Tell everybody that a request is over, and write its rows as soon as it is known what all its calls cost.

    Args:
        state: of the request, none of whose calls is under way any more.
        status: ``ok``, ``error``, ``refused`` or ``cancelled``.
        http_status: that its sender was told.
        code: of the error; "" for none.
        cache: that had its answer; "" for none.
        latency_s: seconds to its end.
    """
    services, report = state.services, state.last_report
    if state.program is not None and state.decided is not None:
        decision = state.decided.decision
        traced = replace(decision, details={**decision.details, "trace": state.program.trace})
        state.decided = replace(state.decided, decision=traced)
    row = row_of(state, report, latency_s, status, code, cache)
    outcome = outcome_of(state, report, status, latency_s)
    services.unsettled.add(state.id, row)
    correct_rate(state)
    try:
        # Writing it runs what a strategy gave.
        plainly(lambda: _log_decision(state, row, report))
    except Exception as error:
        logger.error("why a model was chosen is not in the store: %s", raised(error))
    services.on_finished(finished(state, row, report, outcome, http_status))
    _write(state, row, outcome)


def _write(state: RequestState, row: LedgerRow, outcome: Outcome | None) -> None:
    """Write the rows, once it is known what all calls cost. Until then what was set aside stays so."""
    services = state.services

    def write(held: Reservation | None) -> None:
        correct_rate(state)
        known, calls = priced(state, row), call_rows(state)
        clock = StageClock(services.metrics.staged)
        clock.begin("settle")
        done = settlement.write(services.store, held, known, collected_of(state, known), calls)
        done.add_done_callback(lambda _: clock.end())
        services.unsettled.discard(state.id)
        told = None if outcome is None else replace(outcome, cost=dollars(state.cost_nano))
        services.on_priced(Priced(row=known, calls=tuple(calls), outcome=told))

    settlement.settle(state.purse, [state.last_report, *(call.report for call in state.calls.made)], write)


def correct_rate(state: RequestState) -> None:
    """Take from the rate what was used and it was not told of: of the answer, and of all that was asked on the way, whoever has it.

    What may have been billed was not used for all that is known. It is told once more when that is.
    """
    prompt = state.count.tokens
    asked = [(prompt, state.last_report), *((call.prompt_tokens, call.report) for call in state.calls.made)]
    if state.tpm is None or not any(report.attempts for _, report in asked):
        return
    used = sum(
        length + one.seen if one.is_guess else one.usage.prompt + one.usage.completion
        for length, report in asked
        for one in report.attempts
    )
    more, state.num_rated = used - (prompt if state.num_rated is None else state.num_rated), used
    if more:
        state.services.admission.correct(state.tenant, more, state.tpm, is_shared=state.is_rate_shared)


def _log_decision(state: RequestState, row: LedgerRow, report: Report) -> None:
    if state.decided is None:
        return
    store = state.services.store
    if state.runtime.config.log.decisions:
        told = explained(state.decided, state.attempts, state.arm)
        store.append_decision(state.id, state.strategy, row.model, told)
    if state.keeps_texts and report.model is not None:
        store.append_texts(state.id, texts_of(state))


def outcome_of(state: RequestState, report: Report, status: str, latency_s: float) -> Outcome | None:
    """What the strategy that decided learns of it, but for the cost; None if there is nothing."""
    decided, attempts = state.decided, state.attempts
    if decided is None or not state.strategy or (report.model is None and not attempts):
        return None
    return Outcome(
        query=decided.query,
        model=report.model or attempts[-1].model,
        latency_s=latency_s,
        succeeded=status == "ok",
        decision=decided.decision,
        answer=state.answer_text or None if state.strategy_keeps and state.finish_reason == "stop" else None,
    )
