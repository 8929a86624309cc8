"""Router-R1 with questions of one's own and a recorded pool: read, split, asked, judged; and files that are damaged."""

import json

import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing

from anabranch.data.tokenizer import load_tokenizer
from anabranch.errors import CheckpointError, ConfigError, DataError, TokenizerError
from anabranch.rl import GRPO
from anabranch.rl.router_r1 import RecordedWorld, word_tokenizer
from anabranch.rl.tokens.runs import judge_policy, load_policy
from anabranch.routers.router_r1 import RouterR1
from anabranch.routers.router_r1.grammar import TAGS
from anabranch.train import Constant, TaskRunConfig, TrainConfig, Trainer
from rl_router_small import tiny_decoder

WORDS = [
    "-",
    ":",
    "?",
    "Question",
    "small",
    "large",
    "who",
    "wrote",
    "book",
    "Ann",
    "Bob",
    "None",
    "nothing",
    "of",
    "it",
]
QUESTIONS = [{"question": f"who wrote book {number} ?", "answers": ["Ann", "Ann Smith"]} for number in range(40)]
QUESTIONS_OF_NOTHING = "".join(
    json.dumps({"question": f"which {number} ?", "answers": [" "] if number == 1 else ["", "B"]}) + "\n"
    for number in range(40)
)
TABLE = [
    {"model": "small", "query": "who wrote it ?", "text": "Ann", "completion_tokens": 7},
    {"model": "large", "query": "who wrote it ?", "text": "Bob of nothing"},
]


@pytest.fixture
def files(tmp_path):
    made = word_tokenizer([*(f"<{tag}>" for tag in TAGS), *(f"</{tag}>" for tag in TAGS), *WORDS])
    made.save(tmp_path)
    for name, lines in (("questions", QUESTIONS), ("table", TABLE)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return tmp_path


def config(files, **fields):
    given = {
        "questions": str(files / "questions.jsonl"),
        "table": str(files / "table.jsonl"),
        "tokenizer": str(files),
        "prices": {"small": 0.5, "large": 2.0},
        "about": {"small": "book"},
        "instruction": "{models}",
        "turn_tokens": 16,
        "held_out": 0.3,
    }
    return RecordedWorld.Config(**(given | fields))


def played(world, *turns, question=0):
    play = world.play(question, seed=0)
    for turn in turns:
        play.step(tuple(world.tokenizer.encode(turn)))
    return play.outcome()


ASKS = "<think> who </think> <search> {} : who wrote it ? </search>"
ANSWERS = "<think> it </think> <answer> {} </answer>"


def test_questions_are_split_by_their_text(files):
    world = RecordedWorld(config(files, held_out=0.3))
    assert world.num_questions + world.num_tests == 40
    assert 3 < world.num_tests < 25
    tests = {world.play(number, seed=0, split="test").episode.question for number in range(world.num_tests)}
    (files / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS[::-1][:25])))
    fewer = RecordedWorld(config(files, held_out=0.3))
    again = {fewer.play(number, seed=0, split="test").episode.question for number in range(fewer.num_tests)}
    assert again == tests & {one["question"] for one in QUESTIONS[::-1][:25]}


def test_episodes_ask_the_table(files):
    world = RecordedWorld(config(files))
    outcome = played(world, ASKS.format("small"), ANSWERS.format("Ann"))
    assert outcome.facts.answer == "Ann"
    assert outcome.facts.cost == pytest.approx(7 * 0.5)
    assert outcome.facts.faults == ()
    assert world.rewards([outcome]) == [1.0]
    # Its words are its tokens where the file does not say.
    assert played(world, ASKS.format("large")).facts.cost == pytest.approx(3 * 2.0)
    lost = played(world, "<think> who </think> <search> small : who wrote nothing ? </search>")
    assert lost.facts.invalid == 1
    assert lost.facts.cost == 0
    half = played(world, ANSWERS.format("Ann Bob"))
    assert world.rewards([half]) == [0.0]
    assert RecordedWorld(config(files, measure="f1")).rewards([half]) == [pytest.approx(2 / 3)]
    measured = world.measured([outcome, half])
    assert (measured["exact_match"], measured["calls"]) == (0.5, 0.5)


@pytest.mark.parametrize("answer", ["A", "the", "+", "!!!", "(-)"])
def test_one_question_answered_by_articles_or_signs_refuses_no_file(files, answer):
    """Neither training nor `rl eval`, nor a run of before, could be with a file that had one."""
    rows = [{"question": f"which {number} ?", "answers": [answer]} for number in range(40)]
    (files / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for measure in ("match", "f1"):
        world = RecordedWorld(config(files, measure=measure))
        right, none, wrong = (world.play(0, seed=0) for _ in range(3))
        for play, said in ((right, answer), (none, ""), (wrong, "Ann")):
            play.episode.feed(ANSWERS.format(said))
        outcomes = [play.outcome() for play in (right, none, wrong)]
        assert world.rewards(outcomes)[::2] == [1.0, 0.0]
        assert world.rewards(outcomes)[1] <= 0
        assert [world.measured([outcome])["exact_match"] for outcome in outcomes] == [1.0, 0.0, 0.0]


def test_a_prompt_is_the_papers_unless_another_is_given(files):
    world = RecordedWorld(config(files))
    text = world.tokenizer.decode(world.play(0, seed=0).prompt)
    assert text.startswith("- small : book - large : nothing")
    assert world.strategy()["instruction"] == "{models}"
    plain = RecordedWorld(config(files, instruction=""))
    assert len(plain.play(0, seed=0).prompt) > 100
    assert "instruction" not in plain.strategy()


def with_front(files):
    """The tokenizer of the files, which puts ``<s>`` in front of every text from now on."""
    made = tokenizers.Tokenizer.from_file(str(files / "tokenizer.json"))
    made.add_special_tokens(["<s>"])
    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
    made.save(str(files / "tokenizer.json"))
    return made.token_to_id("<s>")


def test_a_prompt_begins_as_the_model_was_made_and_so_does_a_chat_of_the_gateway(files, tmp_path):
    """The template was replaced by one without ``<s>``, and nothing else put it there."""
    plain = RecordedWorld(config(files)).play(0, seed=0).prompt
    front = with_front(files)
    world = RecordedWorld(config(files))
    play = world.play(0, seed=0)
    assert play.prompt == (front, *plain)
    world.tokenizer.save(tmp_path / "saved")
    served = load_tokenizer(tmp_path / "saved")
    text = world.tokenizer.decode(plain)
    turn = ASKS.format("small")
    told = play.step(tuple(world.tokenizer.encode(turn)))
    chat = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": turn},
        {"role": "user", "content": world.tokenizer.decode(told.tokens)},
    ]
    ids = served.encode_chat(served.apply_chat_template(chat))
    assert ids == [*play.prompt, *served.encode(turn), *told.tokens]
    # Of a router that is taught again.
    again = RecordedWorld(config(files, tokenizer=str(tmp_path / "saved")))
    assert again.play(0, seed=0).prompt == play.prompt


@pytest.mark.parametrize("how", ["load_state_dict", "judge_as"])
def test_a_run_begins_prompts_as_it_did_whoever_goes_on_with_it_or_judges_it(files, tmp_path, how):
    """One that began without ``<s>`` could not go on, and was judged with what it was neither taught nor served with."""
    plain = RecordedWorld(config(files)).play(0, seed=0).prompt
    front = with_front(files)
    state = RecordedWorld(config(files)).state_dict()
    older = {name: value for name, value in state.items() if name != "beginning of prompts"}
    for told, prompt in ((state, (front, *plain)), (older, plain)):
        world = RecordedWorld(config(files))
        getattr(world, how)(told)
        assert world.play(0, seed=0).prompt == prompt
        world.tokenizer.save(tmp_path / "saved")
        served = load_tokenizer(tmp_path / "saved")
        chat = [{"role": "user", "content": world.tokenizer.decode(plain)}]
        assert tuple(served.encode_chat(served.apply_chat_template(chat))) == prompt
        # And so does whoever goes on after that.
        again = RecordedWorld(config(files))
        again.load_state_dict(world.state_dict())
        assert again.play(0, seed=0).prompt == prompt
    # Other tokens are no such matter.
    with pytest.raises(CheckpointError, match="the tokenizer of the run changed since it began"):
        getattr(RecordedWorld(config(files)), how)({**state, "tokenizer": "another"})


def test_a_policy_that_is_read_back_judges_costs_by_the_window_of_its_training(files, tmp_path):
    """It judged by an empty one: the first episode always got .5 of the cost, the others by those before them."""
    world = config(files, max_turns=1, turn_tokens=6, alpha=0.9)
    task = GRPO.Config(
        world=world, model=tiny_decoder(world.build().vocab_size), questions=2, group=2, slots=4, eval_episodes=2
    )
    train = TrainConfig(steps=2, batch_size=4, schedule=Constant.Config(), eval_every=None)
    trainer = Trainer(TaskRunConfig(task=task, train=train), tmp_path / "run")
    for cost in range(1, 9):
        trainer.task.world.window.reward(float(cost))
    trainer.fit()
    trainer.stream.close()
    state = trainer.task.world.state_dict()
    assert len(state["window"]) == 16
    policy = load_policy(tmp_path / "run")
    assert policy.task.world.state_dict()["window"] == state["window"]
    dear = played(policy.task.world, ASKS.format("small"), ANSWERS.format("Ann"))
    cheap = played(policy.task.world, ANSWERS.format("Ann"))
    trained = [trainer.task.world.window.told(outcome.facts.cost**0.5) for outcome in (dear, cheap)]
    assert trained[0] < trained[1]
    found = policy.task.world.rewards([dear, cheap])
    assert found == trainer.task.world.rewards([dear, cheap])
    assert found[0] < 0.5 < found[1]
    judge_policy(policy, episodes=2)
    assert len(policy.task.world.window) == 18
    # Whoever evaluates may have other questions by now.
    (files / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS[::-1])))
    assert load_policy(tmp_path / "run").task.world.state_dict()["window"] == state["window"]


def test_a_router_may_ask_by_other_names_and_the_gateway_knows_them(files):
    asks = ASKS.format("book")
    assert played(RecordedWorld(config(files)), asks).facts.cost == 0
    world = RecordedWorld(config(files, aliases={"book": "small"}, warns=True))
    outcome = played(world, asks, ANSWERS.format("Ann"))
    assert outcome.facts.calls == (("small", "who wrote it ?"),)
    assert outcome.facts.faults == ()
    assert len(world.play(0, seed=0).prompt) > len(RecordedWorld(config(files)).play(0, seed=0).prompt)
    told = world.strategy()
    assert (told["aliases"], told["warns"]) == ({"book": "small"}, True)
    assert {"aliases", "warns"} <= set(RouterR1.Config.__dataclass_fields__)
    assert {"aliases", "warns"}.isdisjoint(RecordedWorld(config(files)).strategy())


@pytest.mark.parametrize("one_colon", [True, False])
def test_a_further_colon_is_a_fault_unless_it_may_be_there(files, one_colon):
    world = RecordedWorld(config(files, one_colon=one_colon))
    outcome = played(world, "<think> who </think> <search> small : who : it </search>", ANSWERS.format("Ann"))
    assert outcome.facts.calls == (("small", "who : it"),)
    assert bool(outcome.facts.faults) == one_colon
    assert world.rewards([outcome]) == [-1.0 if one_colon else 1.0]


def test_it_has_no_traces_to_begin_with(files):
    with pytest.raises(ConfigError, match="RecordedWorld has no traces"):
        RecordedWorld(config(files)).traces(3, seed=0)


def test_a_policy_is_trained_on_it(files, tmp_path):
    world = config(files, max_turns=1, turn_tokens=6)
    task = GRPO.Config(
        world=world,
        model=tiny_decoder(world.build().vocab_size),
        questions=2,
        group=2,
        slots=4,
        eval_episodes=2,
        entropy_weight=0.1,
    )
    train = TrainConfig(steps=2, batch_size=4, schedule=Constant.Config(), eval_every=None)
    trainer = Trainer(TaskRunConfig(task=task, train=train), tmp_path / "run")
    result = trainer.fit()
    trainer.stream.close()
    assert result.step == 2
    assert result.measures["episodes"] == 2


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("questions", "{", "line 1: this is no JSON"),
        ("questions", "[1]", "is no object"),
        ("questions", '{"question": "", "answers": ["a"]}', "nothing is asked"),
        ("questions", '{"question": " ", "answers": ["a"]}', "is blank"),
        ("questions", '{"question": "a", "answers": []}', "answers is .* must be a text"),
        ("questions", '{"question": "a", "answers": [null]}', "answers is .* must be a text"),
        ("questions", '{"question": "a"}', "there is no answer"),
        ("questions", QUESTIONS_OF_NOTHING, "line 2: its answer is blank"),
        ("questions", '{"question": "a", "answers": ["b"]}', "has no question for"),
        ("table", '{"model": "small", "query": 3, "text": "a"}', "has no query"),
        ("table", '{"model": "small", "query": "a", "text": "a", "completion_tokens": -1}', "completion_tokens -1"),
        ("table", '{"model": "small", "query": "a", "text": "a", "prompt_tokens": 1.5}', "prompt_tokens 1.5"),
    ],
)
def test_damaged_files_are_told_by_line(files, name, text, why):
    (files / f"{name}.jsonl").write_text(text)
    with pytest.raises(DataError, match=why):
        RecordedWorld(config(files))


@pytest.mark.parametrize(
    ("fields", "error", "why"),
    [
        ({"questions": "nowhere.jsonl"}, DataError, "nowhere.jsonl"),
        ({"tokenizer": "nowhere"}, TokenizerError, "no tokenizer"),
        ({"prices": {"small": 0.5}}, ConfigError, "has no price"),
        ({"prices": {"small": -1.0, "large": 1.0}}, ConfigError, "must be a number of at least 0"),
        ({"about": {"huge": "x"}}, ConfigError, "not among the models"),
        (
            {"aliases": {"h": "huge"}},
            ConfigError,
            "aliases has 'h' for 'huge', which is not among the models: small, large",
        ),
        ({"instruction": "Ask"}, ConfigError, "no {models}"),
        ({"held_out": 1.0}, ConfigError, "held_out is 1"),
    ],
)
def test_what_cannot_be(files, fields, error, why):
    with pytest.raises(error, match=why.replace("{", r"\{").replace("}", r"\}")):
        RecordedWorld(config(files, **fields))
