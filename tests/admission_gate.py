"""An `Admission` with a clock of its own, and what comes to it."""

import pytest

from anabranch.errors import LimitError
from anabranch.serving.core.admission import Admission, AdmissionConfig
from anabranch.serving.core.overload import OverloadError

OPEN = {"max_in_flight": None, "max_queued": None, "max_queued_tokens": None}


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def gate(*, is_shared=False, **limits):
    clock = Clock()
    return Admission(AdmissionConfig(**{**OPEN, **limits}), is_shared=is_shared, clock=clock), clock


def serve(admission, clock, *, seconds, tokens=10, count=50):
    """Requests one after the other that wait for ``seconds`` each and then end at once."""
    for number in range(count):
        with admission.admit(tokens, f"served{number}") as ticket:
            clock.now += seconds
            ticket.started()


def refused(admission, reason, *arguments, **named):
    before = admission.rejections[reason]
    with pytest.raises(OverloadError) as caught:
        admission.admit(*arguments, **named)
    assert caught.value.reason == reason
    assert admission.rejections[reason] == before + 1
    assert isinstance(caught.value, LimitError)
    return caught.value
