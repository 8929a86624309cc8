"""What the study of FTP runs on: rows of each kind, of which those judged share nothing with those fitted on."""

import gzip
import random

import pytest

from anabranch.data import ByteTokenizer
from anabranch.errors import DataError
from anabranch.files import sha256_of
from anabranch.studies import ftp_rows
from anabranch.studies.apart import runs_of
from anabranch.studies.ftp_rows import Counts, loses, made_rows, mixed, numbers_in, rows_of
from made_texts import made_topics

QUESTION = "Ann has 12 pears. She buys 3 boxes of 1,000 pears. It rains. How many pears has she?"
ANSWER = "3 boxes have 3*1000=3000 pears. 12+3000=3012"
TOKENIZER = ByteTokenizer()


def test_numbers_are_told_without_commas():
    assert numbers_in("1,000 of 2.50, and 7. Then 3") == {"1000", "2.50", "7", "3"}


@pytest.mark.parametrize("seed", range(6))
def test_a_question_in_another_order_and_where_its_facts_stand(seed):
    item, needed = mixed(QUESTION, "How tall is Bob?", ANSWER, TOKENIZER.encode, random.Random(seed))
    text = TOKENIZER.decode(list(item.prompt))
    sentences = ["Ann has 12 pears.", "She buys 3 boxes of 1,000 pears.", "It rains.", "How many pears has she?"]
    assert text.endswith(" How tall is Bob?\n")
    own = text.removesuffix(" How tall is Bob?\n")
    assert sorted(own) == sorted(" ".join(sentences))
    assert TOKENIZER.decode(list(item.continuation)) == ANSWER
    spans = [TOKENIZER.decode(list(item.prompt[start:behind])).strip() for start, behind in needed]
    assert sorted(spans) == sorted(sentences[:2])


def test_which_questions_lose_a_sentence():
    """By hand: of 10 tokens at 0.3 those at 1, 2 and 3 are left out, so a sentence from 0 or 1 on is lost up to the one before 4."""
    item = ftp_rows.Item(tuple(range(10)), (1,))
    assert loses(item, [(0, 4)], 0.3)
    assert loses(item, [(5, 9), (1, 4)], 0.3)
    assert not loses(item, [(0, 5)], 0.3)
    assert not loses(item, [(2, 5), (6, 8)], 0.3)
    assert not loses(item, [], 0.3)


@pytest.fixture
def made_questions(monkeypatch):
    words = made_topics(60, words=15)
    rows = tuple(
        (f"{one[:20]} {n} {one[20:40]}. {one[40:60]} {n + 1}. {one[60:90]}?", f"{n}+{n + 1}={2 * n + 1}")
        for n, one in enumerate(words)
    )
    monkeypatch.setattr(ftp_rows, "questions", lambda: rows)
    monkeypatch.setattr(ftp_rows, "documentation_sections", lambda: made_topics(seed=1))
    return rows


def test_rows_of_each_kind(made_questions):
    counts = Counts(4, 3, 5)
    for kind in ("questions", "contexts", "anywhere"):
        first, again, other = (rows_of(kind, counts, seed, TOKENIZER, 0.3) for seed in (0, 0, 1))
        assert first == again != other
        assert len(first) == len({item.prompt for item in first}) == counts.all
    contexts = rows_of("contexts", counts, 0, TOKENIZER, 0.3)
    assert all(64 <= len(item.prompt) <= 256 for item in contexts)
    assert [len(item.continuation) for item in contexts] == [16] * 7 + [1] * 5
    # Every judged one loses a number by its place.
    for item in rows_of("anywhere", counts, 2, TOKENIZER, 0.3)[7:]:
        cut = item.prompt[:1] + item.prompt[1 + int(0.3 * len(item.prompt)) :]
        question = next(row for row in made_questions if TOKENIZER.decode(list(item.continuation)) == row[1])
        needed = numbers_in(question[0]) & numbers_in(question[1])
        assert not needed <= numbers_in(TOKENIZER.decode(list(cut)))


@pytest.mark.parametrize("kind", ["questions", "contexts", "anywhere"])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_judged_shares_no_run_with_what_was_fitted_on(made_questions, kind, seed):
    counts = Counts(9, 9, 8)
    rows = rows_of(kind, counts, seed, TOKENIZER, 0.3)
    fitted, judged = rows[: counts.fitted], rows[counts.fitted :]
    taken = set().union(*(runs_of(item.tokens) for item in fitted))
    assert not any(taken & runs_of(item.tokens) for item in judged)
    if kind == "contexts":
        seen = [runs_of(item.tokens) for item in judged]
        assert sum(map(len, seen)) == len(set().union(*seen))


@pytest.mark.parametrize("kind", ["questions", "anywhere"])
def test_a_question_with_a_sentence_of_a_fitted_one_is_not_judged(made_questions, kind, monkeypatch):
    rows = tuple(
        (f"The same sentence stands in all of these. {asked}" if number % 3 == 0 else asked, answer)
        for number, (asked, answer) in enumerate(made_questions)
    )
    monkeypatch.setattr(ftp_rows, "questions", lambda: rows)
    made = rows_of(kind, Counts(9, 9, 8), 0, TOKENIZER, 0.3)
    fitted, judged = made[:18], made[18:]
    taken = set().union(*(runs_of(item.tokens) for item in fitted))
    assert any("The same sentence" in TOKENIZER.decode(list(item.prompt)) for item in fitted)
    assert not any(taken & runs_of(item.tokens) for item in judged)


@pytest.mark.parametrize("seed", range(3))
def test_a_topic_of_a_fitted_context_is_not_judged(made_questions, seed, monkeypatch):
    """Two of the topics have a paragraph in common, and are one."""
    topics = made_topics(12, seed=1)
    topics[5] += topics[2][:300]
    monkeypatch.setattr(ftp_rows, "documentation_sections", lambda: topics)
    counts = Counts(20, 20, 8)
    rows = rows_of("contexts", counts, seed, TOKENIZER, 0.3)
    sides = [
        {
            2 if number == 5 else number
            for item in side
            for number, topic in enumerate(topics)
            if TOKENIZER.decode(list(item.prompt)) in topic
        }
        for side in (rows[: counts.fitted], rows[counts.fitted :])
    ]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_contexts_that_share_no_text_may_be_too_few(made_questions, monkeypatch):
    with pytest.raises(DataError, match="contexts were found that share no text; the study needs 90"):
        rows_of("contexts", Counts(2, 0, 90), 0, TOKENIZER, 0.3)
    monkeypatch.setattr(ftp_rows, "documentation_sections", lambda: made_topics(1))
    with pytest.raises(DataError, match="no text for contexts has 80 tokens"):
        rows_of("contexts", Counts(2, 0, 2), 0, TOKENIZER, 0.3)


def test_rows_that_are_not_there(made_questions):
    with pytest.raises(DataError, match="has 60 rows; the study needs 61"):
        rows_of("questions", Counts(60, 0, 1), 0, TOKENIZER, 0.3)
    with pytest.raises(DataError, match="such rows; the study needs 58"):
        rows_of("anywhere", Counts(1, 0, 57), 0, TOKENIZER, 0.05)


def test_another_file_of_questions_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "rows.gz"
    path.write_bytes(
        gzip.compress(b'{"question": "How many?", "answer": "2"}\n\n{"question": "And now?", "answer": "3"}\n')
    )
    monkeypatch.setattr(ftp_rows, "data_file", lambda file, source: path)
    # What was read before is kept.
    read = ftp_rows.questions.__wrapped__
    with pytest.raises(DataError, match=r"rows.gz has sha256 [0-9a-f]{64}; the study is of bb13a52c"):
        read()
    monkeypatch.setattr(ftp_rows, "SHA256", sha256_of(path))
    assert read() == (("How many?", "2"), ("And now?", "3"))


def test_questions_are_prompts_and_solutions_what_follows(made_questions):
    rows = {(f"{asked}\n", answer) for asked, answer in made_questions}
    for item in rows_of("questions", Counts(2, 2, 2), 0, TOKENIZER, 0.3):
        assert (TOKENIZER.decode(list(item.prompt)), TOKENIZER.decode(list(item.continuation))) in rows


def test_rows_of_noise_and_how_many_there_are():
    counts = Counts(4, 3, 5)
    assert (counts.fitted, counts.all) == (7, 12)
    rows = made_rows(counts, 1, vocab_size=9)
    assert rows == made_rows(counts, 1, vocab_size=9) != made_rows(counts, 2, vocab_size=9)
    assert {(len(item.prompt), len(item.continuation)) for item in rows} == {(22, 8)}
    assert len(rows) == 12
    assert {token for item in rows for token in item.tokens} == set(range(9))
