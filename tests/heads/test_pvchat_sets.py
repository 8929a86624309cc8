"""Sets made of one reference: who is in which clip, what is asked, and what does not depend on what."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigError, DataError, InputError
from anabranch.heads.pvchat import (
    Actor,
    Clip,
    Composed,
    InkEmbedder,
    OneShotSet,
    Portrait,
    Vocabulary,
    ask_all,
    look_alikes,
    portraits,
)
from anabranch.heads.pvchat.questions import (
    KINDS,
    WORDINGS,
    answer_to,
    check_name,
    name_of,
    question,
    says_yes,
    split_words,
    words,
)
from anabranch.heads.pvchat.vocabulary import END, UNKNOWN
from drawn_subjects import made_subjects

SUBJECTS = made_subjects(6, 3)
BANK = portraits(SUBJECTS)
FEW = OneShotSet.Config(positives=3, augmented=2, hard_negatives=4, easy_negatives=3, wordings=2)


def made(config=FEW, bank=BANK, **given):
    return OneShotSet(config, "<Ab>", SUBJECTS[0].portrait(0), bank, **given)


def frames(found, source):
    return [clip.frame_FCHW for kind, clip in found.clips if kind == source]


# Questions


def test_answers_by_hand():
    actor = Actor("s0", "red and thick", "moves left", "top left")
    found = {kind: (answer_to(kind, "<Ab>", actor), answer_to(kind, "<Ab>", None)) for kind in KINDS}
    assert found == {
        "existence": ("yes , <Ab> is here", "no , <Ab> is not here"),
        "appearance": ("<Ab> is red and thick", "<Ab> is not here"),
        "action": ("<Ab> moves left", "<Ab> is not here"),
        "location": ("<Ab> is at the top left", "<Ab> is not here"),
    }
    assert answer_to("action", "<Ab>", Actor("s0", "red and thick", None, "top left")) is None
    assert says_yes("Yes, <Ab> is here")
    assert not says_yes("no , <Ab> is not here")


def test_about_fifty_ways_to_ask_whether_it_is_there():
    assert len(WORDINGS["existence"]) >= 45
    for kind in KINDS:
        asked = [question(kind, "<Ab>", number) for number in range(len(WORDINGS[kind]))]
        assert len(set(asked)) == len(asked)
        assert all("<Ab>" in text for text in asked)
        assert question(kind, "<Ab>", len(asked)) == asked[0]


def test_words_of_a_text():
    assert split_words("Where is <Ab>, in the VIDEO?") == ["where", "is", "<Ab>", ",", "in", "the", "video", "?"]
    assert split_words("<a b> 3") == ["a", "b"]
    assert name_of("Greek/char 1") == "<Greek/char_1>"
    for wrong in ("Ab", "<>", "<a b>", "<<a>>", "<" + "a" * 61 + ">", 3):
        with pytest.raises(ConfigError, match="must be a word in angle brackets"):
            check_name(wrong)


def test_a_vocabulary_keeps_its_numbers():
    before = Vocabulary(["<a>"])
    numbers = {word: before.encode(word) for word in [*words(), "<a>"]}
    assert before.add("<b>") == len(before) - 1
    assert {word: before.encode(word) for word in [*words(), "<a>"]} == numbers
    assert (before.subject("<b>"), before.word("<b>")) == (1, len(before) - 1)
    assert before.subjects_in("are <b> and <a> and <b> here ?") == [1, 0]
    text = "yes , <b> is here"
    assert before.decode([*before.encode(text), END, 7]) == text
    assert before.encode("zebra <a>")[0] == UNKNOWN
    assert before.unknown("a zebra is <c>") == ["a", "zebra", "<c>"]
    with pytest.raises(ConfigError, match=r"'<b>', which is in the vocabulary already"):
        before.add("<b>")
    with pytest.raises(InputError, match=r"no subject is named '<c>'; known: <b>, <a>"):
        before.subjects_in("where is <c> ?")
    with pytest.raises(InputError, match="none is known yet"):
        Vocabulary().subject("<a>")
    with pytest.raises(ConfigError, match="stands twice"):
        Vocabulary(known=["a", "a"])


@given(st.text(max_size=40))
@settings(max_examples=40, deadline=None)
def test_any_text_can_be_asked(text):
    known = Vocabulary(["<a>"])
    ids = known.encode(text)
    assert all(0 <= number < len(known) for number in ids)
    assert len(known.unknown(text)) <= len(ids)


# Sets


def test_who_is_in_which_clip():
    found = made()
    assert [source for source, _ in found.clips] == ["positive"] * 3 + ["augmented"] * 2 + ["hard"] * 4 + ["easy"] * 3
    for source, clip in found.clips:
        assert (clip.actor("s0") is not None) == (source in ("positive", "augmented"))
    assert all(other.subject != "s0" for other in found.bank)


def test_look_alikes_are_the_nearest_of_the_bank():
    found = made().found
    others = [portrait for portrait in BANK if portrait.subject != "s0"]
    rows = InkEmbedder().embed([SUBJECTS[0].portrait(0), *others])
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = rows[1:] @ rows[0]
    taken, expected = {}, []
    for row in (-cosine).argsort():
        subject = others[row].subject
        if taken.setdefault(subject, 0) < 2 and len(expected) < 4:
            taken[subject] += 1
            expected.append((subject, pytest.approx(float(cosine[row]), abs=1e-5)))
    assert found == expected
    assert look_alikes(SUBJECTS[0].portrait(0), others, 0) == []


def test_what_is_in_a_bank_twice_counts_once():
    """As learning several subjects at once gives it, whose bank holds the other references already: equal drawings, of other objects."""
    other, same = (
        made(),
        made(bank=[*BANK, *(Portrait(one.subject, one.ink_SS.clone()) for one in BANK[::2]), BANK[-1]]),
    )
    assert same.found == other.found
    assert len(same.bank) == len(other.bank)
    # One drawing of two subjects is two.
    twin = Portrait("twin", BANK[-1].ink_SS)
    assert len(made(bank=[*BANK, twin]).bank) == len(other.bank) + 1


def test_a_set_is_a_function_of_its_seed():
    one, same, other = made(), made(), made(FEW.replace(seed=1))
    for source in ("positive", "augmented", "hard", "easy"):
        pairs = list(zip(frames(one, source), frames(same, source), strict=True))
        assert all(torch.equal(*pair) for pair in pairs)
        assert not all(torch.equal(*pair) for pair in zip(frames(one, source), frames(other, source), strict=True))
    assert one.part("videos").rows == same.part("videos").rows
    assert one.part("videos").rows != other.part("videos").rows


def test_more_of_one_source_changes_nothing_of_another():
    one, more = made(), made(FEW.replace(positives=9, easy_negatives=1))
    for source in ("augmented", "hard"):
        assert all(torch.equal(*pair) for pair in zip(frames(one, source), frames(more, source), strict=True))
    # And of the same source the first are the same.
    assert all(torch.equal(*pair) for pair in zip(frames(one, "positive"), frames(more, "positive"), strict=False))


def test_stages():
    found = made()
    images, videos = found.part("images"), found.part("videos")
    assert {clip.is_image for clip in images.clips} == {True}
    assert all(
        torch.equal(image.frame_FCHW[0], clip.frame_FCHW[0])
        for image, clip in zip(images.clips, videos.clips, strict=True)
    )
    assert {row.kind for row in images.rows} == {"existence", "appearance"}
    assert len(images.rows) == 12 * 2 * 2
    assert len(videos.rows) == 12 * 2 * 4
    for row in videos.rows:
        assert row.present == (row.clip < 5)
        assert row.answer == answer_to(row.kind, "<Ab>", videos.clips[row.clip].actor("s0"))
        assert row.question in {question(row.kind, "<Ab>", number) for number in range(len(WORDINGS[row.kind]))}


def test_balance_by_hand():
    found = made().report()
    assert found.clips == {"positive": 3, "augmented": 2, "hard": 4, "easy": 3}
    assert found.rows == dict.fromkeys(KINDS, (10, 14))
    assert found.yes_share == pytest.approx(10 / 24)
    assert found.positive_to_negative == pytest.approx(5 / 7)
    assert found.warnings == ()


def test_one_sided_sets_are_warned_of():
    with pytest.warns(UserWarning, match="has no negatives: a model that never sees others says yes"):
        found = made(FEW.replace(hard_negatives=0, easy_negatives=0), bank=())
    assert found.report().positive_to_negative == float("inf")
    assert found.report().yes_share == 1
    with pytest.warns(UserWarning, match="has no positives"):
        made(FEW.replace(positives=0, augmented=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made()


def test_images_are_not_asked_what_they_cannot_answer():
    still = Clip(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), (Actor("s0", "red and thin", None, "top left"),))
    rows = ask_all([still], "<Ab>", "s0", KINDS, 1, torch.Generator())
    assert [row.kind for row in rows] == ["existence", "appearance"]
    nobody = Clip(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert [row.kind for row in ask_all([nobody], "<Ab>", "s0", KINDS, 1, torch.Generator())] == [
        "existence",
        "appearance",
    ]


class Plugged:
    """A generator of one's own; what it does is given."""

    def __init__(self, give, of_people=False):
        self.give, self.of_people = give, of_people

    def clips(self, references, count, generator):
        return self.give(references, count)


class Person:
    subject = "somebody"


def still(subject):
    return Clip(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), (Actor(subject, "tall and thin", None, "top left"),))


def by_reference(references, count):
    return [still(references[number % len(references)].subject) for number in range(count)]


def test_generators_and_embedders_are_pluggable():
    class Other:
        def __init__(self, number):
            self.subject, self.number = f"o{number}", number

    class ByNumber:
        def embed(self, references):
            return np.array([[1.0, float(getattr(each, "number", 0))] for each in references])

    generator = Plugged(by_reference)
    found = OneShotSet(
        FEW,
        "<Ab>",
        Person(),
        [Other(number) for number in (5, 1, 3, 2, 4)],
        positives=generator,
        augmented=generator,
        embedder=ByNumber(),
    )
    assert [subject for subject, _ in found.found] == ["o1", "o2", "o3", "o4"]
    assert {row.answer for row in found.part("videos").rows if row.kind == "appearance" and row.present} == {
        "<Ab> is tall and thin"
    }


def test_people_need_consent():
    people = Plugged(by_reference, of_people=True)
    few = FEW.replace(hard_negatives=0, easy_negatives=0)
    for parts in ({"positives": people}, {"positives": Plugged(by_reference), "augmented": people}):
        with pytest.raises(ConfigError, match="works on pictures of people; give consent=True"):
            OneShotSet(few, "<Ab>", Person(), **parts)
    with pytest.warns(UserWarning, match="no negatives"):
        OneShotSet(few, "<Ab>", Person(), positives=people, augmented=people, consent=True)

    class Faces(InkEmbedder):
        of_people = True

    with pytest.raises(ConfigError, match="Faces works on pictures of people"):
        made(embedder=Faces())


@pytest.mark.parametrize(
    ("give", "match"),
    [
        (lambda references, count: [], "was asked for 3 clips .positive. and gave 0 things"),
        (lambda references, count: ["clip"] * count, "each a Clip"),
        (lambda references, count: [still("s1")] * count, "one says that s0 is not in it"),
        (lambda references, count: [still("s0")] * count, "one says that s0 is in it"),
    ],
)
def test_generators_that_give_something_else(give, match):
    with pytest.raises(DataError, match=match):
        made(positives=Plugged(give))


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (lambda n: np.zeros((n + 1, 3)), "it must give a row for each"),
        (lambda n: np.zeros(n), "it must give a row for each"),
        (lambda n: np.full((n, 3), np.nan), "not finite"),
        (lambda n: np.ones((n, n)), "numbers for the reference and"),
    ],
)
def test_embedders_that_give_something_else(rows, match):
    class Odd:
        def embed(self, references):
            return rows(len(references))

    with pytest.raises(InputError, match=match):
        made(embedder=Odd())


def test_sets_that_cannot_be():
    with pytest.raises(ConfigError, match="are all 0; a set needs clips"):
        OneShotSet.Config(positives=0, augmented=0, hard_negatives=0, easy_negatives=0)
    with pytest.raises(DataError, match="7 negatives are to be made, and the bank holds nobody but s0"):
        made(bank=[SUBJECTS[0].portrait(1)])
    with pytest.raises(ConfigError, match="must be a word in angle brackets"):
        OneShotSet(FEW, "Ab", SUBJECTS[0].portrait(0), BANK)
    with pytest.raises(DataError, match="a reference of type int says no subject"):
        OneShotSet(FEW, "<Ab>", 3, BANK)
    with pytest.raises(InputError, match="of no reference"):
        Composed().clips([], 2, torch.Generator())
    assert Portrait("a", torch.zeros(2, 2)).subject == "a"
