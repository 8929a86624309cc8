"""Policies that answer questions of one's own: what changed since may be judged by, and is not gone on with."""

import json

import pytest

from anabranch.errors import CheckpointError
from anabranch.rl import GRPO
from anabranch.rl.router_r1 import word_tokenizer
from anabranch.rl.tokens.answers import AnswersWorld
from anabranch.rl.tokens.runs import judge_policy, load_policy
from anabranch.train import Constant, TaskRunConfig, TrainConfig, Trainer
from rl_router_small import tiny_decoder

ROWS = [{"question": f"who {number} ?", "answer": "Ann"} for number in range(20)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def files(tmp_path):
    word_tokenizer(["who", "?", "Ann", "Bob", *map(str, range(20))]).save(tmp_path)
    write(tmp_path / "questions.jsonl", ROWS)
    (tmp_path / "mine.py").write_text("def reward(row, answer):\n    return float(answer in row.answers)\n")
    return tmp_path


def more_questions(files):
    write(files / "questions.jsonl", [*ROWS, {"question": "who ?", "answer": "Bob"}])


def another_reward(files):
    (files / "mine.py").write_text("def reward(row, answer):\n    return 0.5\n")


def run_in(files):
    """The state of a world in which a step was learned, and its folder."""
    world = AnswersWorld.Config(
        questions=str(files / "questions.jsonl"),
        tokenizer=str(files),
        reward=f"{files / 'mine.py'}:reward",
        turn_tokens=2,
        held_out=0.3,
    )
    task = GRPO.Config(world=world, model=tiny_decoder(world.build().vocab_size), questions=2, group=2, slots=4)
    train = TrainConfig(steps=1, batch_size=4, schedule=Constant.Config(), eval_every=None)
    trainer = Trainer(TaskRunConfig(task=task, train=train), files / "run")
    trainer.fit()
    trainer.stream.close()
    return trainer.task.world.state_dict(), files / "run"


def test_a_run_is_not_judged_with_other_tokens_than_it_learned_with(files):
    """As many tokens with other numbers were taken, and what the policy says was read as something else."""
    _, run = run_in(files)
    load_policy(run)
    word_tokenizer([*map(str, range(20)), "Bob", "Ann", "?", "who"]).save(files)
    with pytest.raises(CheckpointError, match="the tokenizer of the run changed since it began"):
        load_policy(run)


@pytest.mark.parametrize(
    ("change", "what", "settings"),
    [
        (more_questions, "questions", {}),
        (another_reward, "reward", {}),
        (lambda files: write(files / "other.jsonl", ROWS[::-1]), "questions", {"questions": "other.jsonl"}),
        (lambda files: None, "reward", {"reward": "exact"}),
    ],
)
def test_a_run_is_judged_on_other_questions_and_by_another_reward_and_not_gone_on_with(files, change, what, settings):
    """`rl eval` refused a run once its file of questions had a line more."""
    state, run = run_in(files)
    change(files)
    told = {name: str(files / value) if name == "questions" else value for name, value in settings.items()}
    policy = load_policy(run, {f"task.world.{name}": value for name, value in told.items()})
    played, rewards = judge_policy(policy, episodes=2)
    assert len(played) == len(rewards) == 2
    with pytest.raises(CheckpointError, match=f"the {what} of the run changed since it began"):
        policy.task.world.load_state_dict(state)
