"""The public sets, where they are: the folder that ANABRANCH_DATA names."""

import numpy as np
import pytest

from anabranch.errors import DataError
from anabranch.routers.data import check_disjoint, deduplicated, groups, load_outcomes, split
from anabranch.routers.data.sets import SETS
from real_data import needs_data, real_data


@pytest.fixture(scope="module")
def llmrouter():
    return SETS["llmrouter"]()


@needs_data("llm_routing")
def test_llmrouter_is_merged_without_its_copies(llmrouter):
    data = llmrouter.data
    assert (len(data), len(data.models), len(set(data.task))) == (5541, 9, 13)
    assert len(np.unique(groups(data))) == len(data)
    assert np.isfinite(data.score_NM).all()
    assert data.score_NM.max(1).mean() > data.score_NM.mean(0).max() > data.score_NM.mean()


@needs_data("llm_routing")
def test_llmrouter_costs_are_the_prompt_and_512_tokens_at_list_price(llmrouter):
    data, row = llmrouter.data, 17
    tokens = -(-len(data.query[row].encode()) // 4) + 512
    at = data.models.index("gemma-2-9b-it")
    assert data.cost_NM[row, at] == pytest.approx(tokens * 0.1 / 1e6, abs=1e-9)
    sizes = {model.name: model.parameters for model in llmrouter.pool.models}
    assert (sizes["gemma-2-9b-it"], sizes["llama3-chatqa-1.5-70b"]) == (9.0, 70.0)


@needs_data("llm_routing")
def test_the_published_split_leaks_and_is_refused():
    train, test = (load_outcomes(real_data(f"llm_routing/llmrouter_{part}.jsonl.gz")) for part in ("train", "test"))
    with pytest.raises(DataError, match="69 of 450 test questions were learned from"):
        check_disjoint(train, test)


@needs_data("llm_routing")
def test_mmlu_of_two_models():
    found = SETS["routellm_mmlu"]()
    weak, strong = found.data.score_NM.mean(0)
    assert (weak, strong) == (pytest.approx(0.681, abs=0.002), pytest.approx(0.806, abs=0.002))
    assert len(found.data) == len(deduplicated(found.data)) == 13937
    train, test = split(found.data, seed=0)
    check_disjoint(train, test)
    assert found.data.cost_NM[0, 1] / found.data.cost_NM[0, 0] == pytest.approx(24.7 / 0.24)


def test_without_the_folder_it_is_said_what_to_set(monkeypatch, tmp_path):
    monkeypatch.delenv("ANABRANCH_DATA", raising=False)
    with pytest.raises(DataError, match="set ANABRANCH_DATA"):
        SETS["llmrouter"]()
    monkeypatch.setenv("ANABRANCH_DATA", str(tmp_path))
    with pytest.raises(DataError, match="there is no"):
        SETS["routellm_mmlu"]()
