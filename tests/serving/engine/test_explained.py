"""What a request is told of the adapters that its pools chose: the numbers of the library's `explain`, and nothing of its neighbours."""

import pytest
import torch

from anabranch.adapters.glider import GliderPool, explain
from anabranch.adapters.glider.explaining import Explained
from anabranch.serving.adapters import AdaptersConfig
from anabranch.serving.config import ServingConfig
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.explained import MOST_EXPLAINED, Tally, explained
from served_adapters import INSTRUCTIONS, Runs, make_adapters, make_model, make_pool, make_routers

QUERIES = [*INSTRUCTIONS.values(), "Tell me of a river."]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("explained")
    return {**make_adapters(root / "adapters"), **make_routers(root), "clusters": make_pool(root / "clusters")}


@pytest.fixture(scope="module")
def runs(folders):
    load = (
        f"pool={folders['pool']}",
        f"arrow=arrow:{folders['pool']}",
        f"a={folders['a']}",
        f"dynmole={folders['routed_low_rank']}",
    )
    config = ServingConfig(num_blocks=256, dtype="float32", max_seqs=8, adapters=AdaptersConfig(load=load))
    return Runs(Engine.of(make_model(), config))


def ask(runs, *asked, **fields):
    """Outputs of requests (adapters, prompt, query) at once."""
    ids = [runs.put(adapters, prompt, query=query, record_routing=True, **fields) for adapters, prompt, query in asked]
    found = runs.outputs()
    return [found[id] for id in ids]


def test_of_a_token_it_is_what_the_library_says(runs, folders):
    pool = GliderPool.load(folders["pool"])
    pool.onto(make_model())
    outputs = ask(runs, *(("pool", [70 + number], query) for number, query in enumerate(QUERIES)), max_tokens=1)
    for number, (query, output) in enumerate(zip(QUERIES, outputs, strict=True)):
        told, theirs = output.explained["pool"], explain(pool, query, [70 + number])
        assert (told["instruction"], told["tokens"]) == (query, 1)
        assert told["a"] == theirs.a
        by_name = {one.name: one for one in theirs.experts}
        assert [one["name"] for one in told["experts"]] == [one.name for one in theirs.experts]
        for one in told["experts"]:
            assert set(one) == set(Explained.__dataclass_fields__)
            assert one == pytest.approx(by_name[one["name"]].__dict__, abs=2e-3)


def test_requests_beside_each_other_are_told_of_their_own_query(runs):
    prompts = [tuple(range(40 + 5 * number, 60 + 5 * number)) for number in range(len(QUERIES))]
    asked = [("pool", prompt, query) for prompt, query in zip(prompts, QUERIES, strict=True)]
    beside = ask(runs, *asked, ("a", prompts[0], "x"), max_tokens=6)
    alone = [ask(runs, one, max_tokens=6)[0] for one in asked]
    for one, output, own in zip(asked, beside, alone, strict=False):
        assert output.explained["pool"]["instruction"] == one[2]
        assert output.explained["pool"]["tokens"] == 6
        for told, other in zip(output.explained["pool"]["experts"], own.explained["pool"]["experts"], strict=True):
            assert told == pytest.approx(other, abs=2e-3)
        said = repr(output.explained)
        assert not any(query in said for query in QUERIES if query != one[2])
    assert beside[-1].explained == {}
    # What is kept of one ends with it.
    assert set(runs.engine.adapters._tallies) <= set(runs.engine.adapters._mixed)


def test_what_nobody_compares_is_by_tokens_alone(runs):
    prompt = tuple(range(50, 70))
    arrow, silent, mixed, other = ask(
        runs,
        ("arrow", prompt, "x"),
        ("pool", prompt, None),
        ({"pool": 0.5, "arrow": 0.5}, prompt, "law"),
        ("dynmole", prompt, "x"),
    )
    for output, name in ((arrow, "arrow"), (silent, "pool")):
        told = output.explained[name]
        assert (told["instruction"], told["a"]) == (None, 0.0)
        assert all(one["global_share"] == one["global_logit"] == 0 for one in told["experts"])
        assert sum(one["weight"] for one in told["experts"]) == pytest.approx(1, abs=1e-4)
    assert set(mixed.explained) == {"pool", "arrow"}
    assert mixed.explained["pool"]["instruction"] == "law"
    assert other.explained == {}
    # Who does not ask is not told.
    id = runs.put("pool", prompt, query="law")
    assert runs.outputs()[id].explained == {}


def test_the_most_used_are_told():
    tally = Tally.of(40)
    tally.weight_E[:] = 1
    tally.weight_E[35] = 2
    told = explained(tally, None, [f"e{number}" for number in range(40)])
    assert len(told["experts"]) == MOST_EXPLAINED
    assert [one["name"] for one in told["experts"][:2]] == ["e35", "e0"]


def test_decisions_of_several_tokens_are_added_up():
    """Each of its sums: what is told are means over decisions, of what tokens say over those in which it could be chosen."""
    first = Tally(torch.tensor([4.0, 1.0]), torch.tensor([2.0, 1.0]), torch.tensor([1.5, 0.5]), decisions=2)
    second = Tally(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 1.0]), torch.tensor([0.0, 2.0]), decisions=2, tokens=3)
    first.add(second)
    assert (first.local_E.tolist(), first.open_E.tolist(), first.weight_E.tolist()) == ([6, 4], [3, 2], [1.5, 2.5])
    assert (first.decisions, first.tokens) == (4, 4)
    told = explained(first, None, ["a", "b"])
    assert told["tokens"] == 4
    assert [(one["name"], one["local_logit"], one["weight"]) for one in told["experts"]] == [
        ("b", 2.0, 0.625),
        ("a", 2.0, 0.375),
    ]
