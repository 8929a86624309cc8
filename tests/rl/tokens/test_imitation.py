"""The warm start of policies of tokens: what is learned of traces, what is not, and the contract of tasks."""

import pytest
import torch

from anabranch.errors import CapacityError, ConfigError
from anabranch.lm import load_model
from anabranch.lm.decoder import Decoder
from anabranch.nn.attention import SelfAttention
from anabranch.nn.feed_forward import SwiGLU
from anabranch.rl.router_r1 import TwoHopWorld
from anabranch.rl.tokens.imitation import Imitation
from anabranch.testing import check_task
from anabranch.train import Constant, TaskContext, TaskRunConfig, TrainConfig, Trainer
from rl_token_worlds import ASK, END, VOCABULARY, Echo


def model(vocab_size=VOCABULARY, **fields):
    made = {"dim": 32, "num_layers": 1, "max_positions": 128, "attention": SelfAttention.Config(num_heads=2)}
    return Decoder.Config(vocab_size=vocab_size, feed_forward=SwiGLU.Config(hidden_dim=32), **(made | fields))


def run(*, train=None, **fields):
    given = {"world": Echo.Config(), "model": model(), "traces": 64, "eval_traces": 16}
    settings = {"steps": 4, "batch_size": 8, "learning_rate": 1e-2, "schedule": Constant.Config(), "weight_decay": 0.0}
    return TaskRunConfig(task=Imitation.Config(**(given | fields)), train=TrainConfig(**(settings | (train or {}))))


def test_the_contract_of_tasks():
    check_task(run(), ranks=False)


def test_only_what_the_player_wrote_is_learned():
    config = run()
    task = config.task.build()
    stream = task.training_data(TaskContext(config.train, 8))
    token_BL, own_BL = stream.next_batch(8)
    # Prompt, then a letter and the end.
    assert token_BL.shape == (8, 5)
    assert own_BL.tolist() == [[False] * 3 + [True] * 2] * 8
    assert (token_BL[:, 2] == ASK).all()
    assert (token_BL[:, 4] == END).all()
    decoder = task.build_model(TaskContext(config.train, 8))
    losses = task.step(decoder, (token_BL, own_BL), TaskContext(config.train, 8))
    logits_BLV = decoder(token_BL[:, :-1]).logits_BLV
    said_BL = logits_BLV.log_softmax(-1).gather(-1, token_BL[:, 1:, None]).squeeze(-1)
    assert torch.allclose(losses.total, -said_BL[own_BL[:, 1:]].mean(), atol=1e-6)


def test_what_is_certain_is_learned(tmp_path):
    trainer = Trainer(run(train={"steps": 60, "learning_rate": 3e-3}), tmp_path / "run")
    result = trainer.fit()
    # The end is; the letter is drawn, one of six.
    assert 0.5 * 1.7 < result.headline < 1.2
    assert result.measures["accuracy"] >= 0.5
    assert result.measures["tokens"] == 32


def test_a_warm_start_has_the_tokenizer_of_its_world(tmp_path):
    world = TwoHopWorld.Config(entities=8, relations=1, experts=1)
    made = run(world=world, model=model(world.build().vocab_size), train={"steps": 1})
    Trainer(made, tmp_path / "run").fit()
    _, tokenizer = load_model(tmp_path / "run")
    assert tokenizer.encode("<think> r0") == world.build().tokenizer.encode("<think> r0")


@pytest.mark.parametrize(
    ("fields", "error", "why"),
    [
        ({"model": model(4)}, ConfigError, "the world has 9 tokens"),
        ({"model": model(max_positions=4)}, ConfigError, "a trace has 5 tokens"),
        ({"traces": 2**31 - 1}, CapacityError, "use fewer"),
    ],
)
def test_what_cannot_be(tmp_path, fields, error, why):
    with pytest.raises(error, match=why):
        Trainer(run(**fields), tmp_path / "run")
