"""A digest of what a study of routing reads tells every change of it: of a question, of a score, of which questions are the same."""

import dataclasses

import numpy as np
import pytest

from anabranch.routers.contract.query import Model, Pool
from anabranch.routers.data import deduplicated, splits
from anabranch.studies import composition_of_experts, graphrouter, routing_survey
from anabranch.studies.graphrouter_runs import made
from anabranch.studies.outcomes import digest_of

DATA = made(60)
POOL = Pool(tuple(Model(name=name, parameters=7.0) for name in DATA.models))


def test_the_same_is_the_same():
    assert digest_of(DATA, POOL, embedder="a") == digest_of(dataclasses.replace(DATA), POOL, embedder="a")
    assert len(digest_of(DATA)) == 16


@pytest.mark.parametrize(
    "changed",
    [
        {"query": ("another", *DATA.query[1:])},
        {"query": (f"{DATA.query[0]}.", *DATA.query[1:])},
        {"task": ("another", *DATA.task[1:])},
        {"models": ("another", *DATA.models[1:])},
        {"score_NM": np.where(np.arange(60)[:, None] == 3, 0.5, DATA.score_NM)},
        {"cost_NM": None},
    ],
)
def test_what_is_read_is_in_it(changed):
    assert digest_of(dataclasses.replace(DATA, **changed)) != digest_of(DATA)


def test_what_stands_beside_it_is_in_it():
    bigger = Pool(tuple(dataclasses.replace(model, parameters=8.0) for model in POOL.models))
    assert len({digest_of(DATA, pool, embedder=name) for pool in (None, POOL, bigger) for name in ("", "a")}) == 6


def test_a_rule_of_sameness_that_changed_is_in_it(monkeypatch):
    """As when signs began to tell questions apart: the same file, other questions and another split."""
    texts = tuple(f"{text}{'?!'[row % 2]}" for row, text in enumerate(DATA.query))
    data = dataclasses.replace(DATA, query=(*texts[:30], *(f"{text[:-1]}." for text in texts[:30])))
    now = digest_of(deduplicated(data))
    monkeypatch.setattr(splits, "normal_form", lambda text: " ".join(text.strip("?!.").split()))
    assert len(deduplicated(data)) == 30
    assert digest_of(deduplicated(data)) != now


def test_a_rule_of_splitting_that_changed_is_in_it(monkeypatch):
    now, drawn = digest_of(DATA), splits._drawn
    monkeypatch.setattr(splits, "_drawn", lambda data, share_P, seed: drawn(data, share_P, seed + 1))
    assert digest_of(DATA) != now


@pytest.mark.parametrize("module", [graphrouter, routing_survey, composition_of_experts])
def test_every_arm_that_reads_questions_says_which(module):
    study = module.make()
    told = {arm.name: study.inputs(arm.config) for arm in study.arms}
    assert {name for name, digest in told.items() if digest is None} == {
        name for name in told if name.startswith("serve-")
    }
    assert len(set(told.values()) - {None}) == 1
    assert study.noted_only
