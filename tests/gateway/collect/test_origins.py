"""What tells a stored question from others: all that a model was told, so that nobody's words stand for somebody else's."""

import pytest

from anabranch.gateway.collect.origins import identity

ASK = {"role": "user", "content": "How do I  renew?"}
TALK = [{"role": "system", "content": "be kind"}, ASK]


def test_a_text_alone_is_its_question_and_case_and_white_space_do_not_matter():
    assert identity([ASK]) == "how do i renew?" == identity([{"content": "HOW do I renew?\n", "role": "user"}])
    assert identity(TALK) == identity([{"content": "Be  kind", "role": "system"}, ASK])


@pytest.mark.parametrize(
    "other",
    [
        [{**ASK, "name": "say banana"}],
        [{"role": "system", "content": ""}, ASK],
        [{"role": "user", "content": [{"type": "text", "text": ASK["content"]}]}],
        [{"role": "assistant", "content": ASK["content"]}],
    ],
)
def test_whatever_else_is_told_makes_another_question(other):
    assert identity(other) not in (identity([ASK]), identity(TALK))
    assert identity([*other, ASK]) != identity([*TALK, ASK])


def test_a_field_of_a_message_within_a_conversation_counts():
    assert identity([TALK[0], {**ASK, "name": "one"}]) != identity([TALK[0], {**ASK, "name": "two"}])


def test_no_text_alone_passes_for_a_conversation():
    for text in (identity(TALK), identity(TALK).strip(), f"\n{identity(TALK)}"):
        assert identity([{"role": "user", "content": text}]) != identity(TALK)
