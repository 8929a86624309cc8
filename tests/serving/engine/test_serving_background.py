"""An engine beside its reader: tokens as they come, and an engine that outlives a reader who goes away."""

from contextlib import closing

import pytest

from anabranch.errors import AnabranchError, InputError
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.request import Finish, Sampling
from anabranch.serving.engine.background import Background
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.llm import LLM

GREEDY = Sampling(temperature=0, max_tokens=9)


@pytest.fixture
def model(tiny_model):
    return tiny_model()


def background(model, **config):
    return closing(Background(Engine.of(model, ServingConfig(**{"num_blocks": 20, "max_seqs": 1, **config}))))


def tokens(outputs):
    return tuple(token for output in outputs for token in output.tokens)


def test_tokens_come_one_by_one_and_are_those_of_an_engine_that_is_not_beside(model):
    expected = [answer.tokens for answer in LLM(model, num_blocks=20).generate([[1, 2, 3], [7]], GREEDY)]
    with background(model) as running:
        for prompt, whole in zip([[1, 2, 3], [7]], expected, strict=True):
            outputs = list(running.stream(prompt, GREEDY))
            assert (tokens(outputs), outputs[-1].finish) == (whole, Finish.LENGTH)
            assert len(outputs) == len(whole)


def test_who_reads_no_further_ends_the_request_and_not_the_engine(model):
    with background(model) as running:
        whole = tokens(running.stream([1, 2, 3], GREEDY))
        reading = running.stream([1, 2, 3], Sampling(temperature=0, max_tokens=100))
        assert next(reading).tokens == whole[:1]
        with pytest.raises(KeyboardInterrupt):
            reading.throw(KeyboardInterrupt)
        # Its room is free again, and nothing of it is taken for another's.
        assert tokens(running.stream([1, 2, 3], GREEDY)) == whole


def test_what_can_never_run_is_an_input_error(model):
    with background(model) as running:
        for prompt in ([], [31], [1] * 200):
            with pytest.raises(InputError):
                next(running.stream(prompt, GREEDY))
        assert tokens(running.stream([1], Sampling(max_tokens=0))) == ()
        assert len(tokens(running.stream([1], GREEDY))) == 9


def test_an_engine_that_fails_says_so_and_stays_so(model):
    with background(model) as running:

        def fail(*args, **options):
            raise ValueError("broken")

        running._loop.runner.run = fail
        with pytest.raises(AnabranchError, match="ValueError: broken"):
            next(running.stream([1], GREEDY))
        with pytest.raises(AnabranchError, match="broken"):
            list(running.stream([1], GREEDY))


def test_a_closed_engine_leaves_no_thread(model):
    with background(model) as running:
        next(running.stream([1], GREEDY))
    assert not running._thread.is_alive()
    with pytest.raises(AnabranchError):
        list(running.stream([1], GREEDY))


def test_more_positions_than_the_model_is_meant_for_may_be_asked_for(model):
    most = model.config.max_positions
    config = ServingConfig(num_blocks=30, max_seqs=1)
    usual, further = Engine.of(model, config), Engine.of(model, config, most_positions=most + 50)
    assert (usual.info.max_positions, further.info.max_positions) == (most, most + 50)
    with closing(Background(further)) as running:
        assert len(tokens(running.stream([1], Sampling(temperature=0, max_tokens=most + 20)))) == most + 20
