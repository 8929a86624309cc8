"""Scored prompts in a group of real processes: every score comes once, whatever becomes of the devices meanwhile."""

import threading

import pytest
import torch

from anabranch.lm.checkpoint import load_model
from anabranch.serving.core.request import Finish, Request, Sampling
from anabranch.serving.elasticmoe.config import ElasticConfig
from anabranch.serving.elasticmoe.group import Group

CLOSE = 1e-4  # chunks change the order of sums
PROMPTS = [[(7 * number + 3 * place * place) % 61 for place in range(90 + number)] for number in range(6)]


@pytest.fixture
def make(folder, fork_server):
    groups = []

    def make(**changes):
        # Chunks of four tokens: a prompt takes long enough for a change in the middle of it.
        config = ElasticConfig(
            model=str(folder), num_blocks=64, max_seqs=4, max_batched_tokens=8, ahead=False, pace_s=0.01, **changes
        )
        groups.append(Group(config, fork_server=fork_server))
        groups[-1].start()
        return groups[-1]

    yield make
    for group in groups:
        group.close()


class Evaluator:
    """Asks for scores and gathers them."""

    def __init__(self, group, max_tokens):
        self.scores = {number: [] for number in range(len(PROMPTS))}
        self.tokens = dict.fromkeys(self.scores, 0)
        self.ends = []
        self._news = threading.Condition()
        for number, prompt in enumerate(PROMPTS):
            sampling = Sampling(temperature=0.0, max_tokens=max_tokens, prompt_logprobs=1)
            group.ledger.submit(Request(id=str(number), prompt=tuple(prompt), sampling=sampling), self._take)

    def _take(self, output):
        with self._news:
            self.scores[int(output.id)] += output.prompt_logprobs
            self.tokens[int(output.id)] += len(output.tokens)
            if output.finish is not None:
                self.ends.append(output.finish)
            self._news.notify_all()

    def wait(self, true):
        with self._news:
            assert self._news.wait_for(true, 60.0)

    def wait_scores(self, count):
        self.wait(lambda: sum(map(len, self.scores.values())) >= count)

    def check(self, model, max_tokens):
        self.wait(lambda: len(self.ends) == len(PROMPTS))
        assert set(self.ends) == {Finish.LENGTH}
        assert set(self.tokens.values()) == {max_tokens}
        for number, prompt in enumerate(PROMPTS):
            with torch.no_grad():
                log_LV = model(torch.tensor([prompt])).logits_BLV[0].log_softmax(-1)
            assert [one.token for one in self.scores[number]] == prompt[1:]
            wanted = [row_V[token].item() for row_V, token in zip(log_LV, prompt[1:], strict=False)]
            assert [one.logprob for one in self.scores[number]] == pytest.approx(wanted, abs=CLOSE)


@pytest.mark.parametrize("mode", ["migrate", "drain"])
def test_scores_go_on_while_devices_change(make, folder, mode):
    group = make(mode=mode)
    evaluator = Evaluator(group, max_tokens=2)
    evaluator.wait_scores(40)
    assert not evaluator.ends  # prompts are under way
    for devices in (2, 3, 1):
        group.scale(devices)
    evaluator.check(load_model(folder)[0].eval(), 2)


def test_a_rank_dies_while_it_scores(make, folder):
    group = make(devices=2)
    evaluator = Evaluator(group, max_tokens=0)
    evaluator.wait_scores(60)
    group.ledger.active.kill(1)
    evaluator.check(load_model(folder)[0].eval(), 0)
    counters = group.counts.stats(group).counters
    assert counters["elastic_requests_rerun"] > 0
    assert counters["prompt_tokens"] == sum(map(len, PROMPTS))
    assert counters["generation_tokens"] == 0
