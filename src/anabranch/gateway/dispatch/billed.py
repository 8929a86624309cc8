"""What a provider may have billed for an attempt that brought no whole answer. Never less: what is charged must cover the invoice.

nothing     it never went out, or the provider said no: an error with a status, before anything was made
as told     the provider said how many tokens it was
the most    all else. A whole answer is made to its end, whoever waits for it: the prompt and all that was asked for at most.
            A stream ends soon after its connection: what came, and what can have been made in the time of which nothing came.
by text     an answer that came, whole, and did not say: a token for each byte of its text; where it may hold thoughts that are not there,
            not less than can have been made in its time

How many tokens a text has, only its provider knows. No tokenizer makes a token of less than a byte, so that is what a text is charged,
unless the config says that texts are never so dense. Where an upstream says something, more than it said is never taken off.
"""

import math
from dataclasses import replace

from anabranch.gateway.dispatch.plan import Attempt
from anabranch.gateway.providers.provider import Answer, Failure, Usage, answer_bytes

# A proxy before the provider gave up waiting: what it waited for may have been made.
GAVE_UP = frozenset({408, 504, 524})

# Tokens that are made until it is seen that a connection is gone, however fast that is; in a whole answer, marks that are no text.
FEW = 8


def may_be_billed(attempt: Attempt, failure: Failure | None) -> bool:
    """Whether a provider may bill an attempt of which nothing has come; ``failure`` is None if it was cancelled."""
    if attempt.call is None or not attempt.call.is_sent:
        return False
    if failure is None or attempt.has_begun:
        return True
    if failure.status is not None:
        return failure.status in GAVE_UP
    return failure.kind != "connect" or attempt.http_status is not None


def tokens_of(texts: int, text_bytes: int, bytes_per_token: float = 1.0) -> int:
    """Tokens of so many chunks with text, and so many bytes of it, at most."""
    return max(texts, math.ceil(text_bytes / bytes_per_token))


def whole_at_most(
    most: Usage, answer: Answer, bytes_per_token: float = 1.0, unshown: int = 1, in_time: int = 0
) -> Usage:
    """What an answer that came may be billed: what was told; where nothing was, by its text, and not more than the ``most``.

    So many answers as ``unshown`` were made for each that was shown; ``in_time`` tokens can have been made, if not all of them are there.
    """
    said = answer.usage
    if not said.is_estimated:
        return said
    num_bytes, choices = answer_bytes(answer.body)
    if not choices and said.image_output:
        # What it has made nobody sees in a picture; where one is a token, this is one for each that was asked for.
        return Usage(most.prompt, max(most.completion, said.completion), 0, True, image_output=most.image_output)
    if not choices and said.audio_output:
        # It is there, and it is as long as it is.
        return Usage(most.prompt, said.completion, 0, True, audio_output=said.audio_output)
    # Each choice has an end, which is no text.
    made = 0
    if choices:
        made = max((tokens_of(0, num_bytes, bytes_per_token) + choices) * unshown, in_time) + FEW + most.predicted
    completion = min(max(made, said.completion), most.completion)
    if said.tells_prompt:
        return replace(said, completion=completion)
    return Usage(most.prompt, completion, 0, True, calls=said.calls)


def broken_off(most: Usage, told: Usage | None, seen: int, unseen: int | None) -> Usage:
    """The most that a stream may be billed which ended before it told.

    Args:
        most: whatever happens.
        told: by the provider so far; None for nothing.
        seen: completion tokens that came.
        unseen: those at most that may have been made and did not come; None if that is not known.
    """
    # Some say 0 before they know.
    begun = told if told is not None and told.prompt else Usage(most.prompt)
    if most.pages:
        # What it found on the way is read as a prompt is, and told at the end alone.
        begun = replace(begun, prompt=max(begun.prompt, most.prompt))
    said = 0 if told is None else told.completion
    seen = max(seen, said)
    made = most.completion
    if unseen is not None:
        made = seen + unseen + most.predicted
    return replace(begun, completion=max(said, min(made, most.completion)), is_estimated=True)
