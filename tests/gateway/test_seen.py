"""The page's line of a request: a program's tokens are those of its calls, any other's those of its answer."""

from dataclasses import replace

import pytest

from anabranch.gateway.core.finished import Finished, Priced
from anabranch.gateway.store import LedgerRow
from anabranch.gateway.ui.seen import seen_of, with_price

CALLS = tuple(
    LedgerRow(request_id=f"r.{number}", attempts=1, prompt_tokens=number, completion_tokens=2 * number)
    for number in (3, 4)
)


@pytest.mark.parametrize(
    ("attempts", "row", "estimated", "told"),
    [(0, (0, 0), 10, (7, 14)), (1, (5, 6), 10, (5, 6)), (1, (0, 0), 10, (10, 0))],
)
def test_tokens_of_a_line(attempts, row, estimated, told):
    of = LedgerRow(request_id="r", attempts=attempts, prompt_tokens=row[0], completion_tokens=row[1])
    seen = seen_of(Finished(row=of, calls=CALLS, time_s=0.0, endpoint="chat", http_status=200, prompt_tokens=estimated))
    assert (seen.prompt_tokens, seen.completion_tokens) == told
    late = with_price(seen, Priced(row=of, calls=(*CALLS, replace(CALLS[0], request_id="r.9"))))
    more = (3, 6) if not attempts else (0, 0)
    assert (late.prompt_tokens, late.completion_tokens) == (told[0] + more[0], told[1] + more[1])
