"""Questions out of files, and the rewards by which a path answers them rightly or not."""

import json

import pytest
import torch

from anabranch.data import ByteTokenizer
from anabranch.depth.dr_llm import (
    ExactMatch,
    NextToken,
    OptionLikelihood,
    Question,
    contexts,
    find_reward,
    read_questions,
)
from anabranch.depth.dr_llm.masked import embed_masked, takes_masks
from anabranch.depth.dr_llm.questions import is_questions
from anabranch.depth.dr_llm.rewards import OwnReward, boxed, first_letter, identity_of, name_of, shared_prompt
from anabranch.depth.dr_llm.runner import QuestionRuns
from anabranch.depth.stack import run_path
from anabranch.errors import ConfigError, DataError
from anabranch.nn import SelfAttention
from dr_llm_made import stack, transformers_stack

TOKENIZER = ByteTokenizer()
CHOICE = Question("c", (1, 2, 3, 4), (5, 6), ((5, 6), (7,), (8, 9, 10)), 0)
SAME = 1e-5

# Rewards


@pytest.mark.parametrize("path", [(0, 1, 2, 3, 4), (0, 2, 2, 4), (3,)])
def test_the_next_token(path):
    model, prompt = stack(), (3, 1, 4, 1)
    with torch.no_grad():
        best = int(run_path(model, torch.tensor([prompt]), path)[0, -1].argmax())
    for token in (best, (best + 1) % 23):
        assert NextToken()(Question("a", prompt, (token, 2)), QuestionRuns(model).on(path)) == (token == best)


def by_hand(model, path, question):
    """Log-likelihood of each option, one sequence each."""
    found = []
    for option in question.options:
        tokens = (*question.prompt, *option)
        with torch.no_grad():
            log_p_LV = run_path(model, torch.tensor([tokens]), path)[0].log_softmax(-1)
        start = len(question.prompt) - 1
        found.append(float(sum(log_p_LV[start + place, token] for place, token in enumerate(option))))
    return torch.tensor(found)


@pytest.mark.parametrize("make", [stack, transformers_stack, lambda: transformers_stack("gpt2")])
@pytest.mark.parametrize("path", [None, (0, 2, 2, 3)])
def test_all_options_in_one_sequence_score_as_each_alone(make, path):
    model = make()
    path = path or tuple(range(model.num_blocks))
    wanted = by_hand(model, path, CHOICE)
    runs = {}
    for shared in (True, False):
        runs[shared] = QuestionRuns(model)
        reward = OptionLikelihood(share_prompt=shared, per_token=False)
        torch.testing.assert_close(reward.scores(CHOICE, runs[shared].on(path)).float(), wanted, atol=SAME, rtol=0)
        mean = OptionLikelihood(share_prompt=shared).scores(CHOICE, runs[shared].on(path)).float()
        torch.testing.assert_close(mean, wanted / torch.tensor([2.0, 1.0, 3.0]), atol=SAME, rtol=0)
        # The second look cost no block.
        assert (runs[shared].blocks, runs[shared].naive) == (len(path), 2 * len(path))
    right = int((wanted / torch.tensor([2.0, 1.0, 3.0])).argmax())
    for number in range(3):
        assert OptionLikelihood()(CHOICE.with_option(number), runs[True].on(path)) == (number == right)


def test_who_sees_whom():
    tokens, mask_LL, position_L, starts = shared_prompt(Question("c", (1, 2), (5,), ((5, 6), (7,)), 0))
    assert tokens == [1, 2, 5, 6, 7]
    assert mask_LL.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert position_L.tolist() == [0, 1, 2, 3, 2]
    assert starts == [2, 4]


def test_attention_with_windows_scores_options_apart():
    model = stack(local_attention=SelfAttention.Config(num_heads=2, window=3), local_layers=(1,))
    assert not takes_masks(model)
    with pytest.raises(ConfigError, match="windows"):
        embed_masked(
            model, torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, 2), torch.zeros(1, 2, dtype=torch.long)
        )
    path = tuple(range(5))
    found = OptionLikelihood(per_token=False).scores(CHOICE, QuestionRuns(model).on(path))
    torch.testing.assert_close(found.float(), by_hand(model, path, CHOICE), atol=SAME, rtol=0)


def test_masks_have_the_shape_of_pairs():
    token_BL = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ConfigError, match=r"shape \(1, 3\); for these tokens it must have \(1, 3, 3\)"):
        embed_masked(stack(), token_BL, torch.ones(1, 3), token_BL)


def test_options_are_asked_for():
    with pytest.raises(DataError, match="'a' has no options"):
        OptionLikelihood()(Question("a", (1,), (2,)), QuestionRuns(stack()).on((0,)))


class Says:
    """A run that answers a text."""

    def __init__(self, text):
        self.text = text

    def generate(self, prompt, max_tokens, stop):
        assert max_tokens > 0
        return TOKENIZER.encode(self.text)[:max_tokens]


@pytest.mark.parametrize(
    ("name", "answer", "says", "right"),
    [
        ("exact", "blue", " blue\n", 1),
        ("exact", "blue", "Blue", 0),
        ("letter", "B", "B) because", 1),
        ("letter", "(B)", "B", 1),
        ("letter", "B", "Bananas", 0),
        ("letter", "B", "it is B", 0),
        ("boxed", "12", r"so \boxed{12}", 1),
        ("boxed", r"\boxed{1}", r"\boxed{2}", 0),
        ("boxed", "12", r"\boxed{12", 0),
    ],
)
def test_answers_in_text(name, answer, says, right):
    reward = find_reward(name, TOKENIZER, max_tokens=20)
    assert reward(Question("a", (1,), (2,), answer_text=answer), Says(says)) == right
    assert name_of(reward) == f"{name}-20"


def test_what_is_extracted():
    assert [first_letter(text) for text in ("A", " (C).", "*D*", "No", "b", "")] == ["A", "C", "D", None, None, None]
    nested = r"then \boxed{a}, or \boxed{\frac{1}{2}}"
    assert [boxed(text) for text in (nested, " 3 ", "", r"\boxed{1")] == [r"\frac{1}{2}", "3", None, None]
    with pytest.raises(DataError, match="nothing can be extracted of its answer 'word'"):
        find_reward("letter", TOKENIZER)(Question("a", (1,), (2,), answer_text="word"), Says("A"))
    assert name_of(find_reward("boxed", TOKENIZER)) == "boxed-15"


def test_a_greedy_answer_is_decoded():
    model = stack(vocab_size=TOKENIZER.vocab_size)
    path = (0, 1, 2, 3, 4)
    said = QuestionRuns(model).on(path).generate([5, 6], 4, TOKENIZER.stop_ids)
    text = TOKENIZER.decode(said)
    question = Question("a", (5, 6), (1,), answer_text=text)
    assert ExactMatch(TOKENIZER, max_tokens=4)(question, QuestionRuns(model).on(path)) == 1.0


def own(question, run):
    """A reward of a user's."""
    return 0.25


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nearest", "no reward 'nearest'; use next-token, options"),
        ("nowhere:own", "cannot be loaded: ModuleNotFoundError: no module 'nowhere' is installed"),
        ("nowhere.py:own", "cannot be loaded: FileNotFoundError"),
        (f"{__name__}:none", "cannot be loaded"),
        (f"{__name__}:TOKENIZER", "it must be called with a question and a run"),
        (":own", "cannot be loaded"),
    ],
)
def test_rewards_that_there_are_not(name, message):
    with pytest.raises(ConfigError, match=message):
        find_reward(name, TOKENIZER)


def test_a_reward_of_ones_own(tmp_path):
    made = find_reward(f"{__name__}:own", TOKENIZER)
    run = QuestionRuns(stack()).on((0, 1))
    assert made(CHOICE, run) == 0.25
    assert name_of(made) == f"{__name__}:own"
    assert name_of(own) == "own"
    file = tmp_path / "mine.py"
    file.write_text(
        "def length(question, run):\n    return len(run.path)\n\n\ndef broken(question, run):\n    return 1 / 0\n"
    )
    assert find_reward(f"{file}:length", TOKENIZER)(CHOICE, run) == 2
    with pytest.raises(DataError, match="fails on question 'c': ZeroDivisionError: division by zero"):
        find_reward(f"{file}:broken", TOKENIZER)(CHOICE, run)
    # It is another one when the file is changed, unless it says itself what it is.
    before = identity_of(find_reward(f"{file}:length", TOKENIZER))
    assert before == identity_of(find_reward(f"{file}:length", TOKENIZER)) != f"{file}:length"
    file.write_text("def length(question, run):\n    return -len(run.path)\n")
    assert identity_of(find_reward(f"{file}:length", TOKENIZER)) != before
    file.write_text(file.read_text() + "\n\nlength.name = 'second'\n")
    assert identity_of(find_reward(f"{file}:length", TOKENIZER)) == f"{file}:length second"
    assert identity_of(OwnReward("mine", own)) == "mine"
    for nameless in (own, type("Nameless", (), {"name": "", "__call__": own})()):
        with pytest.raises(ConfigError, match="has no attribute name"):
            identity_of(nameless)
    file.write_text("def")
    with pytest.raises(ConfigError, match="cannot be loaded: SyntaxError"):
        find_reward(f"{file}:length", TOKENIZER)
    assert name_of(find_reward("options", TOKENIZER)) == "options"
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        ExactMatch(TOKENIZER, max_tokens=0)


# Questions


def written(tmp_path, *rows, name="q.jsonl"):
    place = tmp_path / name
    place.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return place


def test_questions_by_hand(tmp_path):
    place = written(
        tmp_path,
        {"id": "one", "prompt": "2+3=", "answer": "5"},
        "",
        {"id": 7, "question": "red?", "options": ["yes", "no"], "answer": "B"},
        {"input": "x", "choices": ["a1", "b1", "c1"], "target": 2},
        {"instruction": "say", "output": ["hello", "hi"]},
    )
    one, seven, third, last = read_questions(place, TOKENIZER)
    assert one == Question("one", tuple(b"2+3="), tuple(b"5"), answer_text="5")
    assert (seven.id, seven.correct, seven.answer, seven.option_texts) == ("7", 1, tuple(b"no"), ("yes", "no"))
    assert (third.correct, third.answer_text) == (2, "c1")
    assert last.answer_text == "hello"
    assert len({third.id, last.id, ""}) == 3
    # A name by content, wherever the row stands.
    assert read_questions(written(tmp_path, {"instruction": "say", "output": "hello"}), TOKENIZER)[0].id == last.id
    assert read_questions(
        written(tmp_path, {"id": "one", "prompt": "2+3=", "answer": "5"}, "{"), TOKENIZER, limit=1
    ) == [one]
    assert is_questions(place)
    assert is_questions(place.rename(tmp_path / "Q.JSONL"))
    assert not is_questions(written(tmp_path, {"text": "a"}))
    assert not is_questions(written(tmp_path, {"prompt": "a"}, name="q.txt"))
    assert not is_questions(tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "this is no JSON"),
        ("[1]", "is no object"),
        ({"answer": "a"}, "nothing is asked"),
        ({"prompt": "", "answer": "a"}, "nothing is asked"),
        ({"prompt": {"a": 1}, "answer": "a"}, "it must be a text"),
        ({"prompt": "a"}, "there is no answer"),
        ({"prompt": "a", "answer": ""}, "the answer has no tokens"),
        ({"prompt": "a", "answer": None}, "there is no answer"),
        ({"prompt": "a", "answer": True}, "answer is true"),
        ({"prompt": "a", "options": ["x"], "answer": "x"}, "at least two texts"),
        ({"prompt": "a", "options": "xy", "answer": "x"}, "at least two texts"),
        ({"prompt": "a", "options": ["x", ""], "answer": "x"}, "at least two texts"),
        ({"prompt": "a", "options": ["x", "y"], "answer": "z"}, "one of the options, its letter, or 0 to 1"),
        ({"prompt": "a", "options": ["x", "y"], "answer": "C"}, "one of the options"),
        ({"prompt": "a", "options": ["x", "y"], "answer": 2}, "one of the options"),
        ({"prompt": "a", "options": ["x", "y"], "answer": True}, "one of the options"),
        ({"prompt": "a", "answer": "b", "id": 1.5}, r"id is 1\.5"),
        ({"prompt": "a", "answer": "b", "id": True}, "id is true"),
    ],
)
def test_rows_that_ask_nothing(tmp_path, row, message):
    with pytest.raises(DataError, match=f"line 2: .*{message}"):
        read_questions(written(tmp_path, {"prompt": "a", "answer": "b"}, row), TOKENIZER)


def test_files_that_ask_nothing(tmp_path):
    for place, message in (
        (written(tmp_path), "asks nothing"),
        (tmp_path, "is a folder"),
        (tmp_path / "none.jsonl", "cannot read"),
    ):
        with pytest.raises(DataError, match=message):
            read_questions(place, TOKENIZER)
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_questions(tmp_path / "latin.jsonl", TOKENIZER)
    twice = written(tmp_path, {"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": "b"})
    with pytest.raises(DataError, match="comes twice"):
        read_questions(twice, TOKENIZER)
    with pytest.raises(DataError, match="has token 97; the model has 0 to 49"):
        read_questions(written(tmp_path, {"prompt": "a", "answer": "b"}), TOKENIZER, vocabulary=50)


def test_windows_of_a_text():
    token_BL = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8]])
    found = contexts(token_BL)
    assert [(one.prompt, one.answer) for one in found] == [((1, 2, 3), (4,)), ((5, 6, 7), (8,))]
    assert contexts(token_BL[2:])[0].id == found[1].id
    assert [(one.prompt, one.answer) for one in contexts(token_BL, after=3)] == [((1,), (2, 3, 4)), ((5,), (6, 7, 8))]
    with pytest.raises(DataError, match="at least 5"):
        contexts(token_BL, after=4)
